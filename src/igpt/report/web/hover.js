"use strict";
// The values under the pointer, or at the place the arrow keys go to.
for (const area of document.querySelectorAll(".area")) {
  const numbers = (text) => text.split(" ").map(Number);
  const lines = [...area.querySelectorAll(".line")].map((line) => ({
    name: line.dataset.name,
    colour: [...line.classList].find((name) => name.startsWith("colour-")),
    x: numbers(line.dataset.x),
    y: numbers(line.dataset.y),
    said: line.dataset.y.split(" ").map((y) => area.dataset.percent ? `${(100 * y).toFixed(1)} %` : y),
  }));
  const places = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const low = Number(area.dataset.low), high = Number(area.dataset.high);
  const scale = area.dataset.log ? Math.log10 : (x) => x;
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
    const x = places[at], share = (scale(x) - low) / (high - low);
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
    show(nearest(places.map(scale), low + (high - low) * (event.clientX - box.left) / box.width));
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
// The cell of a confusion matrix under the pointer, or that the arrow keys go to.
for (const cells of document.querySelectorAll(".cells")) {
  const figure = cells.closest("figure"), k = Number(figure.dataset.k);
  const names = [...figure.querySelectorAll(".classes bdi")].map((name) => name.textContent);
  const counts = figure.dataset.counts && figure.dataset.counts.split(";").map(
    (row) => new Map(row ? row.split(",").map((cell) => cell.split(":").map(Number)) : []));
  const mark = document.createElement("div"), tip = document.createElement("div");
  mark.className = "cell";
  tip.className = "tip";
  tip.setAttribute("role", "status");
  mark.hidden = tip.hidden = true;
  cells.append(mark, tip);
  let at = null;

  const inside = (place) => Math.min(k - 1, Math.max(0, place));
  const called = (index) => names[index] ?? `class ${index}`;
  const show = (row, column) => {
    at = [row, column];
    const rows = [["class", called(row)], ["taken for", called(column)]];
    if (counts) {
      const count = counts[row].get(column) ?? 0, all = [...counts[row].values()].reduce((a, b) => a + b, 0);
      const share = all ? `, ${(100 * count / all).toFixed(1)} %` : "";
      rows.push(["images", `${count.toLocaleString("en")} of ${all.toLocaleString("en")}${share}`]);
    }
    tip.replaceChildren(...rows.map(([what, value]) => {
      const line = document.createElement("div"), left = document.createElement("span"), right = document.createElement("bdi");
      left.textContent = what;
      right.textContent = value;
      line.append(left, right);
      return line;
    }));
    Object.assign(mark.style, {left: `${100 * column / k}%`, top: `${100 * row / k}%`, width: `${100 / k}%`, height: `${100 / k}%`});
    const x = (column + .5) / k, y = (row + .5) / k, beside = (share) => `calc(${100 * share}% + ${50 / k}% + .4rem)`;
    tip.style.left = x < .5 ? `${100 * x}%` : "auto";
    tip.style.right = x < .5 ? "auto" : `${100 * (1 - x)}%`;
    tip.style.top = y < .5 ? beside(y) : "auto";
    tip.style.bottom = y < .5 ? "auto" : beside(1 - y);
    mark.hidden = tip.hidden = false;
  };
  const hide = () => { mark.hidden = tip.hidden = true; };
  const follow = (event) => {
    const box = cells.getBoundingClientRect();
    const place = (from, length) => inside(Math.floor(k * from / length));
    show(place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width));
  };
  cells.addEventListener("pointermove", follow);
  cells.addEventListener("pointerdown", follow);
  cells.addEventListener("pointerleave", hide);
  cells.addEventListener("blur", hide);
  cells.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    if (at === null) show(0, 0); else show(inside(at[0] + step[0]), inside(at[1] + step[1]));
  });
}
