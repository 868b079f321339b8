// Lets a box be drawn over the picture of a gr.HTML by mouse, pen or finger, and hands it to Python as relative xyxy.
// gradio gives: element (the component's), trigger (an event to Python). A new picture replaces all children of element,
// so they are looked up when they are needed.
let start = null;

function place(event) {
  const frame = element.querySelector("img").getBoundingClientRect();
  const share = (value, low, size) => Math.min(Math.max((value - low) / size, 0), 1);
  return [share(event.clientX, frame.left, frame.width), share(event.clientY, frame.top, frame.height)];
}

function span(event) {
  const end = place(event);
  const [x, y] = [0, 1].map((axis) => [start[axis], end[axis]].sort((a, b) => a - b));
  return [x[0], y[0], x[1], y[1]];
}

function show([x1, y1, x2, y2]) {
  const style = element.querySelector(".box").style;
  [style.left, style.top] = [`${100 * x1}%`, `${100 * y1}%`];
  [style.width, style.height] = [`${100 * (x2 - x1)}%`, `${100 * (y2 - y1)}%`];
  style.display = "block";
}

element.addEventListener("pointerdown", (event) => {
  const surface = event.target.closest(".surface");
  if (!surface || event.button !== 0) return;
  event.preventDefault();
  surface.setPointerCapture(event.pointerId); // moves outside the picture are seen too
  start = place(event);
});

element.addEventListener("pointermove", (event) => {
  if (start) show(span(event));
});

element.addEventListener("pointerup", (event) => {
  if (!start) return;
  const box = span(event);
  start = null;
  if (box[2] - box[0] < 0.005 || box[3] - box[1] < 0.005) return; // a click
  show(box);
  trigger("submit", { box });
});

element.addEventListener("pointercancel", () => (start = null));
