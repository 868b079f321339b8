// Curves of a run, drawn from the page's data block; what they show is granvit.eval.curves.panels.
(() => {
  const { stages, panels } = JSON.parse(document.getElementById("curves-data").textContent);
  const place = document.getElementById("curves"), slider = document.getElementById("smoothing");
  const end = Math.max(1, ...stages.map((stage) => stage.end));
  const HEIGHT = 220, TOP = 20, BOTTOM = 22, LEFT = 46, RIGHT = 10;

  const element = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const html = (name, attributes, text) => {
    const node = document.createElement(name);
    Object.assign(node, attributes);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Exponential moving average, corrected for its start, as granvit.eval.curves.smooth.
  const smooth = (points, share) => {
    let average = 0, weight = 0;
    return points.map(([step, value]) => {
      average = share * average + (1 - share) * value;
      weight = share * weight + (1 - share);
      return [step, average / weight];
    });
  };
  const ticks = (low, top, number, least = 0) => {
    const raw = (top - low) / number, power = 10 ** Math.floor(Math.log10(raw));
    const unit = Math.max(least, [1, 2, 5, 10].find((factor) => factor * power >= raw) * power);
    const first = Math.ceil(low / unit - 1e-9), last = Math.floor(top / unit + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * unit);
  };
  const words = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(3)));

  const draw = (panel, figure) => {
    const width = Math.max(260, figure.clientWidth), share = Number(slider.value);
    const all = panel.series.flatMap((series) => series.parts.flat().map((point) => point[1]));
    all.push(0, ...panel.levels.map((level) => level.value));
    const low = 1.05 * Math.min(...all), top = 1.05 * (Math.max(...all) || (low ? 0 : 1));
    const x = (step) => LEFT + (step / end) * (width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - ((value - low) / (top - low)) * (HEIGHT - TOP - BOTTOM);
    const path = (points) => points.map(([s, v], i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": panel.title });

    stages.forEach((stage, i) => {
      const from = x(stage.start), wide = x(stage.end) - from;
      if (i % 2) svg.append(element("rect", { class: "band", x: from, y: TOP, width: wide, height: HEIGHT - TOP - BOTTOM }));
      if (wide > 40) svg.append(element("text", { x: from + wide / 2, y: TOP - 6, "text-anchor": "middle" }, stage.name));
    });
    for (const value of ticks(low, top, 4)) {
      svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      svg.append(element("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, words(value)));
    }
    for (const step of ticks(0, end, width < 400 ? 3 : 5, 1))
      svg.append(element("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, String(step)));
    for (const level of panel.levels) {
      const line = element("line", { class: "level", x1: LEFT, x2: width - RIGHT, y1: y(level.value), y2: y(level.value) });
      line.append(element("title", {}, `${level.name} ${words(level.value)}`));
      svg.append(line);
    }
    const shown = [];
    for (const series of panel.series) for (const part of series.parts) {
      if (series.smooth) svg.append(element("path", { class: `raw ${series.colour}`, d: path(part) }));
      const points = series.smooth ? smooth(part, share) : part;
      if (series.joined) svg.append(element("path", { class: `curve ${series.colour}`, d: path(points) }));
      if (!series.joined || part.length <= 40)
        for (const [s, v] of points)
          svg.append(element("circle", { class: series.colour, cx: x(s), cy: y(v), r: series.joined ? 2.5 : 4.5 }));
      for (const [s, v] of points) shown.push({ s, v, series });
    }

    const cursor = element("circle", { class: "cursor", r: 5, visibility: "hidden" });
    svg.append(cursor);
    const output = figure.querySelector("output");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const [px, py] = [event.clientX - box.left, event.clientY - box.top].map((v) => (v * width) / box.width);
      let best = null, least = Infinity;
      for (const point of shown) {
        const distance = Math.abs(x(point.s) - px) + 0.2 * Math.abs(y(point.v) - py);
        if (distance < least) [best, least] = [point, distance];
      }
      for (const [key, value] of Object.entries({ cx: x(best.s), cy: y(best.v), visibility: "visible" }))
        cursor.setAttribute(key, value);
      const stage = stages.find((some) => best.s <= some.end) ?? stages.at(-1);
      output.textContent = `${stage.name}, step ${Math.round(best.s - stage.start)}: ${words(best.v)} (${best.series.name})`;
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      output.textContent = "";
    });
    figure.querySelector("svg")?.remove();
    figure.querySelector(".legend").before(svg);
  };

  const figures = panels.map((panel) => {
    const figure = html("div", { className: "curve-panel" });
    const legend = html("p", { className: "legend soft" });
    if (panel.series.length > 1)
      for (const series of panel.series) {
        const mark = html("i", { className: series.colour }, series.joined ? "━ " : "● ");
        legend.append(html("span", {}, ""));
        legend.lastChild.append(mark, series.name);
      }
    for (const level of [...panel.levels].sort((a, b) => b.value - a.value))
      legend.append(html("span", {}, `┄ ${level.name} ${words(level.value)}`));
    figure.append(html("b", {}, panel.title), legend, html("output", { className: "soft" }));
    return figure;
  });
  document.getElementById("curves-picture").remove();
  place.append(...figures);
  document.getElementById("curves-tools").hidden = false;
  const redraw = () => {
    document.getElementById("smoothing-value").textContent = Number(slider.value).toFixed(2);
    panels.forEach((panel, i) => draw(panel, figures[i]));
  };
  slider.addEventListener("input", redraw);
  let last = 0;
  new ResizeObserver(() => {
    if (place.clientWidth !== last) { last = place.clientWidth; redraw(); }
  }).observe(place);
})();
