// Decisions about likely wrong labels: made by keyboard, kept in this browser, handed out as a CSV.
'use strict';

const review = JSON.parse(document.getElementById('review').textContent);
const cards = [...document.querySelectorAll('.card')];
const filter = document.getElementById('filter');
const progress = document.getElementById('progress');
const choice = document.getElementById('choice');
const classes = document.getElementById('classes');
const storageKey = `label review of ${review.version}`;

let decisions = new Map(); // sha256 and path → {decision, label}
let history = []; // [key, what was decided before], for undo
let current = 0;
let unsaved = false;

const keyOf = (at) => `${review.rows[at].sha256} ${review.rows[at].path}`;
const shown = () => cards.map((_, at) => at).filter((at) => !cards[at].hidden);

// A browser may forbid pages of files to keep anything: the review then lasts as long as the page is open.
function keep() {
  try { localStorage.setItem(storageKey, JSON.stringify([...decisions])); } catch { /* see above */ }
}

function recall() {
  try { decisions = new Map(JSON.parse(localStorage.getItem(storageKey) ?? '[]')); } catch { decisions = new Map(); }
}

function show() {
  let decided = 0;
  cards.forEach((card, at) => {
    const made = decisions.get(keyOf(at));
    card.setAttribute('aria-current', String(at === current));
    if (made) {
      decided += 1;
      card.dataset.decision = made.decision;
      card.querySelector('.state').textContent =
        made.decision === 'keep' ? '✓ kept' : made.decision === 'leave out' ? '✗ left out' : `→ ${made.label || 'no label'}`;
    } else {
      delete card.dataset.decision;
      card.querySelector('.state').textContent = '';
    }
  });
  progress.textContent = `${decided} of ${cards.length} decided`;
}

function mark(at) {
  current = at;
  show();
  cards[at]?.focus({ preventScroll: true });
  cards[at]?.scrollIntoView({ block: 'nearest' });
}

function decide(decision, label) {
  if (!cards.length || cards[current].hidden) return;
  const key = keyOf(current);
  history.push([key, decisions.get(key), current]);
  decisions.set(key, { decision, label });
  unsaved = true;
  keep();
  const open = shown().filter((at) => !decisions.has(keyOf(at)));
  mark(open.find((at) => at > current) ?? open[0] ?? current);
}

function undo() {
  const last = history.pop();
  if (!last) return;
  const [key, before, at] = last;
  if (before) decisions.set(key, before); else decisions.delete(key);
  unsaved = true;
  keep();
  mark(at);
}

function choose() {
  if (!cards.length || cards[current].hidden) return;
  const likely = review.rows[current].likely.split(review.separator);
  for (const option of classes.options) option.selected = likely.includes(option.value);
  choice.showModal();
  classes.focus();
}

// At once, and not when the dialog says that it has closed: by then the next key may have been pressed.
function take() {
  const taken = [...classes.selectedOptions].map((option) => option.value).sort().join(review.separator);
  choice.close();
  if (taken || review.several) decide(taken === review.rows[current].given ? 'keep' : 'relabel', taken);
}

function csv() {
  const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [['path', 'sha256', 'given', 'decision', 'label']];
  review.rows.forEach((row, at) => {
    const made = decisions.get(keyOf(at));
    if (made) lines.push([row.path, row.sha256, row.given, made.decision, made.label]);
  });
  return lines.map((line) => line.map(cell).join(',')).join('\n') + '\n';
}

function download() {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([csv()], { type: 'text/csv' }));
  link.download = 'reviewed.csv';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
}

// Cards above and below have the nearest left edge.
function step(key) {
  const open = shown();
  const place = open.indexOf(current);
  if (place < 0) return open[0] ?? current;
  const columns = open.filter((at) => cards[at].offsetTop === cards[open[0]].offsetTop).length;
  const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key];
  return open[Math.min(Math.max(place + move, 0), open.length - 1)];
}

const actions = {
  k: () => decide('keep', review.rows[current].given),
  t: () => decide('relabel', review.rows[current].likely),
  c: choose,
  x: () => decide('leave out', ''),
  u: undo,
  d: download,
};

document.addEventListener('keydown', (event) => {
  if (choice.open || event.target === filter || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith('Arrow')) {
    event.preventDefault();
    mark(step(event.key));
  } else if (actions[event.key.toLowerCase()]) {
    event.preventDefault();
    actions[event.key.toLowerCase()]();
  }
});
for (const button of document.querySelectorAll('button[data-key]')) {
  button.addEventListener('click', () => actions[button.dataset.key]());
}
cards.forEach((card, at) => card.addEventListener('click', () => mark(at)));
classes.addEventListener('keydown', (event) => {
  if (event.key === 'Enter') {
    event.preventDefault();
    take();
  }
});
classes.addEventListener('dblclick', take);
choice.querySelector('form').addEventListener('submit', (event) => {
  event.preventDefault();
  take();
});
document.getElementById('cancel').addEventListener('click', () => choice.close());
filter.addEventListener('change', () => {
  for (const card of cards) card.hidden = filter.value !== '' && card.dataset.pair !== filter.value;
  filter.blur();
  mark(shown()[0] ?? current);
});
window.addEventListener('beforeunload', (event) => { if (unsaved) event.preventDefault(); });

recall();
mark(Math.max(0, cards.findIndex((_, at) => !decisions.has(keyOf(at)))));
