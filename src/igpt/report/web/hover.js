"use strict";
// The values under the pointer, or at the place the arrow keys go to.
for (const area of document.querySelectorAll(".area")) {
  const numbers = (text) => text.split(" ").map(Number);
  const lines = [...area.querySelectorAll(".line")].map((line) => ({
    name: line.dataset.name,
    colour: line.classList[1],
    x: numbers(line.dataset.x),
    y: numbers(line.dataset.y),
    said: line.dataset.y.split(" "),
  }));
  const places = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const low = Number(area.dataset.low), high = Number(area.dataset.high);
  const cursor = document.createElement("div"), tip = document.createElement("div");
  cursor.className = "cursor";
  tip.className = "tip";
  tip.setAttribute("role", "status");
  cursor.hidden = tip.hidden = true;
  area.append(cursor, tip);
  let at = -1;

  const nearest = (values, x) => {
    let left = 0, right = values.length - 1;
    while (right - left > 1) {
      const middle = (left + right) >> 1;
      if (values[middle] < x) left = middle; else right = middle;
    }
    return Math.abs(values[left] - x) <= Math.abs(values[right] - x) ? left : right;
  };
  const show = (place) => {
    at = place;
    const x = places[at], share = (x - low) / (high - low);
    cursor.style.left = `${100 * share}%`;
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + .6rem)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + .6rem)`;
    const rows = [[`${area.dataset.unit} ${x.toLocaleString("en")}`, "", ""]];
    for (const line of lines) {
      const i = line.x.indexOf(x);
      if (i >= 0) rows.push([line.name, line.said[i], line.colour]);
    }
    tip.replaceChildren(...rows.map(([name, value, colour]) => {
      const row = document.createElement("div"), left = document.createElement("span"), right = document.createElement("b");
      left.textContent = name;
      left.className = colour;
      right.textContent = value;
      row.append(left, right);
      return row;
    }));
    cursor.hidden = tip.hidden = false;
  };
  const hide = () => { cursor.hidden = tip.hidden = true; };
  const follow = (event) => {
    const box = area.getBoundingClientRect();
    show(nearest(places, low + (high - low) * (event.clientX - box.left) / box.width));
  };
  area.addEventListener("pointermove", follow);
  area.addEventListener("pointerdown", follow);
  area.addEventListener("pointerleave", hide);
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(Math.min(places.length - 1, Math.max(0, at + step)));
  });
}
