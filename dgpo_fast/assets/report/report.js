// Shows a chart's values beside the pointer, at the step nearest to it.
const readout = document.getElementById("readout");

function nearest(series, step) {
  const gap = i => Math.abs(series.x[i] - step);
  const best = series.x.reduce((best, _, i) => gap(i) < gap(best) ? i : best, 0);
  return { ...series, x: series.x[best], y: series.y[best], gap: gap(best) };
}

function row(point) {
  const line = document.createElement("p");
  line.className = point.color;
  line.append(document.createElement("i"), point.label, Object.assign(document.createElement("b"), { textContent: point.y }));
  return line;
}

for (const plot of document.querySelectorAll(".plot")) {
  const { end, series } = JSON.parse(plot.dataset.readout);
  const drawn = series.filter(one => one.x.length);
  const cursor = plot.querySelector(".cursor");

  plot.addEventListener("pointermove", event => {
    if (!drawn.length) return;
    const box = plot.getBoundingClientRect();
    const pointed = (event.clientX - box.left) / box.width * end;
    const reach = end / 80;
    const candidates = drawn.map(one => nearest(one, pointed)).sort((a, b) => a.gap - b.gap);
    const { x: step } = candidates.find(one => one.mark === "points" && one.gap <= reach) ?? candidates[0];
    const heading = Object.assign(document.createElement("p"), { textContent: `step ${step}` });
    // Held-out points are far apart: one speaks only where the pointer is on it.
    const points = drawn.map(one => nearest(one, step)).filter(one => one.gap <= reach);
    readout.replaceChildren(heading, ...points.map(row));
    readout.hidden = false;
    const room = innerWidth - event.clientX - readout.offsetWidth - 24;
    readout.style.left = `${room > 0 ? event.clientX + 16 : Math.max(8, event.clientX - readout.offsetWidth - 16)}px`;
    readout.style.top = `${event.clientY + 16}px`;
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, `${step / end * 100}%`);
    cursor.style.visibility = "visible";
  });

  plot.addEventListener("pointerleave", () => {
    readout.hidden = true;
    cursor.style.visibility = "hidden";
  });
}
