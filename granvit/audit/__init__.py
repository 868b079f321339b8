"""What is in a Gran dataset, what is wrong with it, and which captions a trained model doubts."""
