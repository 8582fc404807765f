"use strict";
// Values under the pointer: a line in the chart, the numbers in its legend.
for (const figure of document.querySelectorAll("figure[data-hover]")) {
  const { box: [x, y, width, height], span, steps, shown } = JSON.parse(figure.dataset.hover);
  const svg = figure.querySelector("svg"), at = figure.querySelector(".at");
  const values = [...figure.querySelectorAll(".legend li b")], last = values.map((b) => b.textContent);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("class", "cursor");
  svg.addEventListener("pointermove", (event) => {
    const rect = svg.getBoundingClientRect();
    const place = (event.clientX - rect.left) / rect.width * svg.viewBox.baseVal.width;
    const wanted = span[0] + (place - x) / width * (span[1] - span[0]);
    let best = 0;
    steps.forEach((step, i) => { if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = i; });
    const left = x + (steps[best] - span[0]) / (span[1] - span[0]) * width;
    line.setAttribute("d", `M${left} ${y}V${y + height}`);
    svg.append(line);
    values.forEach((b, i) => { b.textContent = shown[i][best] || "–"; });
    at.textContent = `step ${steps[best]}`;
  });
  svg.addEventListener("pointerleave", () => {
    line.remove();
    values.forEach((b, i) => { b.textContent = last[i]; });
    at.textContent = "";
  });
}
// Rollouts: search, filter, order.
const form = document.getElementById("filter");
if (form) {
  const list = document.getElementById("samples"), articles = [...list.children];
  const text = articles.map((article) => article.textContent.toLowerCase());
  const apply = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    articles.forEach((article, i) => {
      const keep = words.every((word) => text[i].includes(word))
        && (!wanted.stage || article.dataset.stage === wanted.stage)
        && (!wanted.verdict || article.dataset.verdict === wanted.verdict);
      article.hidden = !keep;
      count += keep;
    });
    const key = wanted.order, ordered = [...articles];
    if (key) ordered.sort((a, b) => b.dataset[key] - a.dataset[key]);
    list.append(...ordered);
    form.querySelector("output").textContent = `${count} of ${articles.length}`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
// Light and dark.
const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});
