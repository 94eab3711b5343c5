// Draws the points, names the nearest one, and opens its image.
'use strict';

const points = JSON.parse(document.getElementById('points').textContent);
const canvas = document.getElementById('canvas');
const pen = canvas.getContext('2d');
const by = document.getElementById('by');
const legend = document.getElementById('legend');
const hover = document.getElementById('hover');
const hidden = new Set(); // values of the legend that are switched off
const MARGIN = 12;
const REACH = 14;

const place = (point) => [
  MARGIN + point.x * (canvas.width - 2 * MARGIN), MARGIN + point.y * (canvas.height - 2 * MARGIN),
];
const isShown = (point) => !hidden.has(point[by.value]);

function colours() {
  const names = [...new Set(points.map((point) => point[by.value]))].sort();
  return new Map(names.map((name, at) => [name, `hsl(${Math.round(at * 360 / names.length)} 75% ${at % 2 ? 40 : 55}%)`]));
}

function draw() {
  const colour = colours();
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (const point of points.filter(isShown)) {
    pen.fillStyle = colour.get(point[by.value]);
    pen.beginPath();
    pen.arc(...place(point), 3.5, 0, 2 * Math.PI);
    pen.fill();
  }
  legend.replaceChildren(...[...colour].map(([name, shade]) => {
    const item = document.createElement('li');
    const button = document.createElement('button');
    const dot = document.createElement('i');
    dot.style.background = shade;
    const count = points.filter((point) => point[by.value] === name).length;
    button.append(dot, `${name} (${count})`);
    button.setAttribute('aria-pressed', String(!hidden.has(name)));
    button.addEventListener('click', () => {
      if (!hidden.delete(name)) hidden.add(name);
      draw();
    });
    item.append(button);
    return item;
  }));
}

function nearest(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) * canvas.width / box.width;
  const y = (event.clientY - box.top) * canvas.height / box.height;
  let best = null;
  let least = REACH;
  for (const point of points.filter(isShown)) {
    const [left, top] = place(point);
    const distance = Math.hypot(left - x, top - y);
    if (distance < least) [best, least] = [point, distance];
  }
  return best;
}

canvas.addEventListener('mousemove', (event) => {
  const point = nearest(event);
  hover.hidden = !point;
  if (!point) return;
  document.getElementById('picture').src = point.picture ?? '';
  document.getElementById('words').textContent = `${point.class} · ${point.split} · ${point.status} · ${point.path}`;
  hover.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 280)}px`;
  hover.style.top = `${Math.min(event.clientY + 14, window.innerHeight - 220)}px`;
});
canvas.addEventListener('mouseleave', () => { hover.hidden = true; });
canvas.addEventListener('click', (event) => {
  const point = nearest(event);
  if (point) window.open(point.file, '_blank', 'noopener');
});
by.addEventListener('change', () => {
  hidden.clear();
  draw();
});
draw();
