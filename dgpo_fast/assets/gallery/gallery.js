// Orders and filters the prompts by the change of a metric; without it all are there, as given.
const controls = document.getElementById("controls");
const [metric, order, show, containing, shown] = ["metric", "order", "show", "containing", "shown"].map(id => document.getElementById(id));
const list = document.getElementById("entries");
const given = [...list.children].map(element => ({
  element,
  changes: JSON.parse(element.dataset.changes),
  text: element.querySelector("h3").textContent.toLowerCase(),
}));

const kinds = {
  all: () => true,
  better: change => change !== null && change > 0,
  equal: change => change === 0,
  worse: change => change !== null && change < 0,
  failed: change => change === null,
};

function arrange() {
  const change = entry => entry.changes[metric.value];
  const sign = { given: 0, improved: -1, worsened: 1 }[order.value];
  // What has no change comes last, whichever end is first.
  const rank = entry => change(entry) === null ? Infinity : sign * change(entry);
  const wanted = containing.value.trim().toLowerCase();
  const ordered = sign ? [...given].sort((a, b) => rank(a) === rank(b) ? 0 : rank(a) - rank(b)) : given;
  let count = 0;
  for (const entry of ordered) {
    const fits = kinds[show.value](change(entry)) && entry.text.includes(wanted);
    entry.element.hidden = !fits;
    count += fits;
    list.append(entry.element);
  }
  shown.textContent = `${count} of ${given.length} prompts`;
}

controls.addEventListener("input", arrange);
controls.addEventListener("submit", event => event.preventDefault());
controls.hidden = false;
arrange();
