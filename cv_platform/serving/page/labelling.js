// The labelling page: the next image, the model's proposal, and a key for each answer.

import { addLabel, agreement, Failure, labelTask, labelTasks, skipLabel, withdrawLabel } from './api.js';
import { $, announce, element, percent } from './dom.js';
import { drawHeat } from './heatmap.js';
import { withKey } from './key.js';
import { complain, quiet } from './notice.js';

const AT_ONCE = 12;
const MOST_PASSED = 100;
const MOST_KEYS = 9;
const REASONS = {
  random: 'Asked as one of a random sample.',
  uncertain: 'Asked because the model was unsure.',
  novel: 'Asked because the dataset has nothing like it.',
  unknown: 'Asked because the model does not know it.',
  drift: 'Asked because it drives the drift report.',
  disagreeing: 'Asked because champion and challenger disagree.',
  unlabelled: 'Asked because it lies in a folder that nobody has labelled.',
  'second opinion': 'Somebody else has labelled it.',
  'low confidence': 'One of the latest answers of low confidence.',
};
const EMPTY = {
  queue: 'The queue is empty, or you have labelled or skipped all of it. The asset labeling_queue fills it.',
  second: 'Nobody has labelled what you have not.',
  review: 'All of the latest answers have been labelled.',
};

let names = [];
let isMultiLabel = false;
let tasks = [];
let shown = null;
let chosen = new Set();
let wrong = new Set();
let isBusy = false;
let isLoading = false;
let turn = 0;
const done = [];
const passed = new Set();

// What is asked

async function load() {
  const mine = turn += 1;
  quiet();
  const mode = $('mode').value;
  shown = null; // No key answers what was asked before, for whoever presses it waits for what is asked now.
  announce('');
  isLoading = true;
  let answer;
  try {
    answer = await withKey(() => labelTasks(mode, AT_ONCE, [...passed].slice(-MOST_PASSED)));
  } catch (error) {
    if (mine === turn) { isLoading = false; complain(error); state('away', 'Not available'); show(null); }
    return;
  }
  if (mine !== turn) return;
  isLoading = false;
  names = answer.class_names;
  isMultiLabel = answer.classifier_type === 'multi-label';
  // What was skipped long ago and is not in the queue comes again.
  tasks = answer.tasks.filter(({ prediction_id: id }) => !passed.has(id));
  state('ready', `Labels are ${answer.labeller}’s`);
  $('waiting').textContent = answer.waiting === 1 ? '1 image is waiting' : `${answer.waiting} images are waiting`;
  if ($('view').value === 'grid' && !isMultiLabel) showGrid(); else next();
}

function state(name, text) {
  $('model').dataset.state = name;
  $('model-text').textContent = text;
}

function next() {
  $('grid-work').hidden = true;
  return show(tasks[0] ?? null);
}

async function show(task) {
  shown = null;
  $('work').hidden = !task;
  $('empty').hidden = Boolean(task) || $('model').dataset.state !== 'ready';
  $('grid-work').hidden = true;
  $('empty-text').textContent = EMPTY[$('mode').value];
  if (!task) { announce($('empty').hidden ? '' : 'Nothing is waiting.'); return; }
  const mine = turn;
  announce(''); // Until this image is drawn, no key answers: what is said of the one before must not stand there.
  $('original').removeAttribute('src');
  $('heat').hidden = true;
  $('verdict').textContent = wording(task);
  $('why').textContent = REASONS[task.reason] ?? '';
  chosen = new Set(isMultiLabel ? proposal(task) : []);
  $('search').value = '';
  listClasses();
  try {
    task.result ??= await withKey(() => labelTask(task.prediction_id));
  } catch (error) {
    if (mine !== turn || tasks[0] !== task) return;
    if (error.status !== 404) { complain(error); return; }
    // Deleted since it was asked.
    tasks.shift();
    settle();
    return;
  }
  if (mine !== turn || tasks[0] !== task) return;
  await picture(task.result);
  shown = task;
  announce(`The model proposes ${wording(task)}. ${$('why').textContent}`);
}

const proposal = (task) => (isMultiLabel ? task.proposal.split('|').filter(Boolean) : [task.proposal]);

function wording(task) {
  const said = proposal(task).join(', ') || 'none of the classes';
  return task.confidence === null || isMultiLabel ? said : `${said}, ${percent(task.confidence)}`;
}

async function picture({ original_img: data, media_type: type, cam }) {
  const image = $('original');
  image.hidden = !data;
  if (data) {
    image.src = `data:${type};base64,${data}`;
    await image.decode().catch(() => {});
    image.parentElement.style.aspectRatio = Math.min(1.8, Math.max(0.7, image.naturalWidth / (image.naturalHeight || 1)));
  }
  const notes = [];
  if (!data) notes.push('The image cannot be shown.');
  const isDrawn = Boolean(data && cam?.length && cam.some((row) => row.some((value) => value > 0)));
  if (isDrawn) drawHeat($('heat'), cam, image.naturalWidth || 1, image.naturalHeight || 1);
  else notes.push('There is no heat-map.');
  $('heat').dataset.isDrawn = isDrawn;
  $('pictures-note').textContent = notes.join(' ');
  $('pictures-note').hidden = !notes.length;
  setHeat();
}

function setHeat() {
  $('heat').hidden = !($('heat-on').checked && $('heat').dataset.isDrawn === 'true');
}

// Classes: names are data, never markup

function listed() {
  const wanted = $('search').value.trim().toLowerCase();
  return names.filter((name) => name.toLowerCase().includes(wanted));
}

function listClasses() {
  $('search-label').hidden = names.length <= MOST_KEYS;
  $('send').hidden = !isMultiLabel;
  $('classes').replaceChildren(...listed().map((name, at) => element('li', {},
    element('button', { type: 'button', ariaPressed: String(chosen.has(name)), onclick: () => choose(name) },
      ...(at < MOST_KEYS ? [element('kbd', { textContent: String(at + 1), ariaHidden: 'true' })] : []),
      element('span', { className: 'name', textContent: name })))));
}

function choose(name) {
  if (!isMultiLabel) { say([name]); return; }
  if (!chosen.delete(name)) chosen.add(name);
  listClasses();
}

// What is said

async function act(work) {
  if (isBusy) return;
  isBusy = true;
  quiet();
  try { await work(); } catch (error) { complain(error); } finally { isBusy = false; }
}

function say(classes) {
  const task = shown;
  if (!task) return;
  act(async () => {
    try {
      await withKey(() => addLabel(task.prediction_id, classes));
      remember([task]);
    } catch (error) {
      if (error.status !== 404) throw error;
      complain(new Failure('This image has been deleted meanwhile.'));
    }
    leave([task]);
  });
}

function skip() {
  const task = shown;
  if (!task) return;
  act(async () => {
    await withKey(() => skipLabel(task.prediction_id));
    passed.add(task.prediction_id);
    leave([task]);
  });
}

function undo() {
  const last = done.at(-1);
  if (!last) return;
  act(async () => {
    for (const task of last) {
      await withKey(() => withdrawLabel(task.prediction_id)).catch((error) => { if (error.status !== 404) throw error; });
    }
    done.pop();
    $('undo').disabled = !done.length;
    if (isLoading) { load(); return; } // Another list was chosen meanwhile.
    tasks = [...last, ...tasks];
    count(last.length);
    announce('Taken back.');
    $('view').value = 'one';
    turn += 1;
    next();
  });
}

function remember(labelled) {
  done.push(labelled);
  $('undo').disabled = false;
}

function leave(gone) {
  tasks = tasks.filter((task) => !gone.includes(task));
  count(-gone.length);
  settle();
}

function count(change) {
  const waiting = Math.max(0, Number.parseInt($('waiting').textContent, 10) + change);
  $('waiting').textContent = waiting === 1 ? '1 image is waiting' : `${waiting} images are waiting`;
}

function settle() {
  turn += 1;
  if (tasks.length && !isLoading) next(); else load();
}

// Many at once

async function showGrid() {
  shown = null;
  wrong = new Set();
  $('work').hidden = true;
  $('empty').hidden = tasks.length > 0;
  $('empty-text').textContent = EMPTY[$('mode').value];
  $('grid-work').hidden = !tasks.length;
  const mine = turn;
  $('tiles').replaceChildren(...tasks.map((task) => {
    const image = element('img', { alt: '' });
    const tile = element('button', { type: 'button', ariaPressed: 'false', ariaLabel: `Proposed: ${wording(task)}` }, image,
      element('span', { className: 'name', textContent: wording(task) }));
    tile.onclick = () => {
      if (!wrong.delete(task)) wrong.add(task);
      tile.ariaPressed = String(wrong.has(task));
    };
    Object.assign(task, { image });
    return element('li', {}, tile);
  }));
  for (const task of [...tasks]) {
    if (mine !== turn) return;
    try {
      task.result ??= await withKey(() => labelTask(task.prediction_id));
      if (task.result.original_img) task.image.src = `data:${task.result.media_type};base64,${task.result.original_img}`;
    } catch (error) {
      if (error.status === 404) { tasks = tasks.filter((other) => other !== task); task.image.closest('li').remove(); } else { complain(error); return; }
    }
  }
}

function confirmGrid() {
  act(async () => {
    const said = [];
    try {
      // Only what was seen is confirmed.
      for (const task of tasks.filter((one) => !wrong.has(one) && one.result)) {
        await withKey(() => addLabel(task.prediction_id, proposal(task)));
        said.push(task);
      }
    } finally {
      if (said.length) remember(said);
      tasks = tasks.filter((task) => !said.includes(task));
      count(-said.length);
    }
    announce(`${said.length} images labelled.`);
    if (wrong.size) $('view').value = 'one';
    turn += 1;
    if (tasks.length && wrong.size && !isLoading) next(); else load();
  });
}

// How far people agree

async function showAgreement() {
  if (!$('agreement').open) return;
  try {
    const { images, pairs } = await withKey(agreement);
    const row = (tag, ...cells) => element('tr', {}, ...cells.map((text) => element(tag, { textContent: text })));
    const people = Object.entries(images).map(([name, count]) => row('td', name, count));
    const agreed = pairs.map(({ first, second, images: n, agreed: same, kappa }) => row('td', `${first} and ${second}`, n, percent(same / n), kappa === null ? '–' : kappa.toFixed(2)));
    $('agreement-text').replaceChildren(
      element('table', {}, row('th', 'Labeller', 'Images'), ...people),
      ...(agreed.length ? [element('table', {}, row('th', 'Both', 'Images', 'Agreed', 'Cohen’s κ'), ...agreed)] : [element('p', { className: 'fine', textContent: 'No two people have labelled the same image.' })]),
    );
  } catch (error) { complain(error); }
}

const KEYS = {
  Enter: () => shown && say(isMultiLabel ? [...chosen] : proposal(shown)),
  n: () => say([]),
  s: skip,
  u: undo,
  h: () => { $('heat-on').checked = !$('heat-on').checked; setHeat(); },
  '/': () => $('search').focus(),
};

addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || $('key-dialog').open) return;
  const typing = event.target === $('search');
  if (event.target.closest?.('select, summary') || (event.target.closest?.('button, a') && event.key === 'Enter')) return;
  if (typing && event.key === 'Escape') { $('search').value = ''; listClasses(); $('search').blur(); return; }
  if (typing && event.key === 'Enter') { const [first] = listed(); if (first) { event.preventDefault(); $('search').blur(); choose(first); } return; }
  if (typing || $('work').hidden && event.key !== 'u') return;
  const digit = Number(event.key);
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const does = digit >= 1 && digit <= MOST_KEYS ? () => { const name = listed()[digit - 1]; if (name !== undefined && shown) choose(name); } : KEYS[key];
  if (!does) return;
  event.preventDefault();
  does();
});
$('accept').addEventListener('click', () => KEYS.Enter());
$('none').addEventListener('click', () => say([]));
$('send').addEventListener('click', () => say([...chosen]));
$('skip').addEventListener('click', skip);
$('undo').addEventListener('click', undo);
$('confirm').addEventListener('click', confirmGrid);
$('heat-on').addEventListener('change', setHeat);
$('search').addEventListener('input', listClasses);
// A list that keeps the focus would take the keys that answer.
for (const id of ['mode', 'view']) $(id).addEventListener('change', () => { $(id).blur(); load(); });
$('agreement').addEventListener('toggle', showAgreement);
load();
