"""What several tests of training share."""

import datasets
import pytest

from granvit.data.schema import CHAT_FEATURES


@pytest.fixture(scope="session")
def chats(sample_set, tmp_path_factory):
    """The sample set's pictures with conversations in place of regions."""
    rows = datasets.load_from_disk(str(sample_set))
    talk = [
        {"role": role, "content": text}
        for role, text in [
            ("user", "What is it?"),
            ("assistant", "A picture."),
            ("user", "Sure?"),
            ("assistant", "Yes."),
        ]
    ]
    changed = {"regions": [], "caption": None, "conversations": [talk, talk[:2]]}
    path = tmp_path_factory.mktemp("chats") / "chats"
    rows.map(lambda row: changed, features=CHAT_FEATURES).save_to_disk(path)
    return path
