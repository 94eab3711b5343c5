// The page: choose an image, see what the model says and where it looked, say when it is wrong.

import { Failure, feedback, hasKey, health, passport, predict, stored, useKey } from './api.js';
import { drawHeat } from './heatmap.js';

const $ = (id) => document.getElementById(id);
const SHOWN_BARS = 5;
const HISTORY_LENGTH = 24;
const HISTORY = 'history';
const TINY_PX = 128;

const state = { shown: null, history: [], turn: 0, retry: null, maxBytes: null };

// Elements are made by hand and filled with textContent: class names and messages are data, never markup.
function element(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

function percent(share) {
  if (share === null || share === undefined) return '–';
  const value = share * 100;
  if (value > 0 && value < 0.1) return '< 0.1 %';
  if (value < 100 && value > 99.9) return '> 99.9 %';
  return `${value.toFixed(value === 0 || value === 100 ? 0 : 1)} %`;
}

function ranked(result) {
  return Object.entries(result.prediction).sort((a, b) => b[1] - a[1]);
}

// What the model is, and whether it is there

async function showModel() {
  try {
    const status = await health();
    const ready = status.model_name && status.model_version;
    $('model').dataset.state = ready ? 'ready' : 'away';
    $('model-text').textContent = ready ? `${status.model_name}, version of ${madeOn(status.model_version)}` : 'No model is deployed yet';
    if (ready) $('model').title = status.model_version;
    state.maxBytes = status.max_upload_bytes ?? null;
    if (state.maxBytes) $('drop-hint').textContent = `JPEG, PNG, WebP, BMP, TIFF or GIF, up to ${Math.floor(state.maxBytes / 1e5) / 10} MB`;
  } catch (error) {
    $('model').dataset.state = 'away';
    $('model-text').textContent = 'The service does not answer';
  }
}

// Versions begin with the time they were made: 20260131T060000Z-1f3c9a2e.
function madeOn(version) {
  const parts = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z/.exec(version);
  if (!parts) return version;
  const [, year, month, day, hour, minute, second] = parts.map(Number);
  return new Date(Date.UTC(year, month - 1, day, hour, minute, second)).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
}

// Notices

function complain(error) {
  const failure = error instanceof Failure ? error : new Failure('Something went wrong in this page.', { detail: String(error) });
  $('notice-text').textContent = failure.message;
  $('notice-detail').textContent = failure.detail;
  $('notice').hidden = false;
  if (failure.status === 401) askForKey();
}

function quiet() {
  $('notice').hidden = true;
  $('notice-text').textContent = '';
  $('notice-detail').textContent = '';
}

function askForKey() {
  $('key-title').textContent = hasKey() ? 'That key was not accepted' : 'This service needs a key';
  $('key').value = '';
  $('key-dialog').showModal();
}

// Sending

async function attempt(work) {
  state.turn += 1;
  const turn = state.turn;
  state.retry = () => attempt(work);
  quiet();
  document.body.classList.add('busy');
  $('status').textContent = 'The model is looking at the image…';
  try {
    const item = await work();
    // A later image wins over the answer to an earlier one.
    if (turn === state.turn) show(item, { announce: true });
  } catch (error) {
    if (turn === state.turn) {
      $('status').textContent = '';
      // An earlier answer below the complaint would look like the answer to this image; the history still has it.
      state.shown = null;
      $('result').hidden = true;
      showHistory();
      complain(error);
    }
  } finally {
    if (turn === state.turn) document.body.classList.remove('busy');
  }
}

function send(file) {
  attempt(async () => {
    if (state.maxBytes && file.size > state.maxBytes) {
      throw new Failure(`This image is too large: at most ${Math.floor(state.maxBytes / 1e5) / 10} MB are allowed.`);
    }
    const result = await predict(file);
    const item = { id: result.prediction_id, result, url: URL.createObjectURL(file) };
    const size = await measure(item.url);
    // Some formats (TIFF) are readable for the service but not for the browser: the stored picture is shown instead.
    if (!size) await useStoredPicture(item);
    else Object.assign(item, size);
    item.thumb = await thumbnail(item.url);
    remember(item);
    return item;
  });
}

function open(id) {
  const known = state.history.find((item) => item.id === id);
  if (known?.result) {
    state.turn += 1;
    document.body.classList.remove('busy');
    quiet();
    show(known, { announce: true });
    return;
  }
  attempt(async () => {
    const item = Object.assign(known ?? { id }, { result: await stored(id) });
    await useStoredPicture(item);
    if (!known) {
      item.thumb = item.url ? await thumbnail(item.url) : null;
      remember(item);
    }
    return item;
  });
}

async function useStoredPicture(item) {
  item.url = null;
  const result = item.result.original_img === undefined ? await stored(item.id).catch(() => ({})) : item.result;
  if (!result.original_img) return;
  item.url = `data:${result.media_type};base64,${result.original_img}`;
  Object.assign(item, await measure(item.url));
}

async function measure(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    return null;
  }
}

async function thumbnail(url) {
  if (!url) return null;
  const image = new Image();
  image.src = url;
  try { await image.decode(); } catch { return null; }
  const scale = Math.min(1, 96 / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = element('canvas', { width: Math.max(1, image.naturalWidth * scale), height: Math.max(1, image.naturalHeight * scale) });
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/png');
}

// Showing a result

function show(item, { announce }) {
  state.shown = item;
  const { result } = item;
  document.body.classList.add('has-result');
  $('result').hidden = false;
  const classes = result.predicted_classes ?? [result.predicted_class];
  const several = result.classifier_type === 'multi-label';
  $('over').textContent = several ? 'This shows' : 'This is most likely';
  $('verdict').textContent = classes.length ? classes.join(', ') : 'none of the known classes';
  showBars(result, classes, false);
  showPictures(item);
  showFeedback(result, classes, several);
  showPassport(result);
  showHistory();
  history.replaceState(null, '', `#${item.id}`);
  if (announce) {
    const [name, share] = ranked(result)[0];
    $('status').textContent = `${$('over').textContent} ${several ? $('verdict').textContent : `${name}, ${percent(share)}`}.`;
    if (matchMedia('(max-width: 820px)').matches) $('result').scrollIntoView({ block: 'start' });
  }
}

function showBars(result, chosen, all) {
  const entries = ranked(result);
  const count = all ? entries.length : Math.max(SHOWN_BARS, Math.min(chosen.length, entries.length));
  $('bars').replaceChildren(...entries.slice(0, count).map(([name, share]) => {
    const bar = element('i');
    bar.style.width = `${(share ?? 0) * 100}%`;
    return element('li', { className: chosen.includes(name) ? 'chosen' : '' },
      element('span', { className: 'name', textContent: name }),
      element('span', { className: 'share', textContent: percent(share) }),
      element('span', { className: 'track', ariaHidden: 'true' }, bar));
  }));
  $('more').hidden = entries.length <= SHOWN_BARS;
  $('more').textContent = all ? 'Show fewer classes' : `Show all ${entries.length} classes`;
  $('more').ariaExpanded = String(all);
  $('more').onclick = () => showBars(result, chosen, !all);
}

function showPictures(item) {
  const { result } = item;
  for (const id of ['original', 'under']) {
    const image = $(id);
    image.hidden = !item.url;
    if (item.url) image.src = item.url; else image.removeAttribute('src');
    image.classList.toggle('tiny', Math.max(item.width ?? 0, item.height ?? 0) < TINY_PX);
  }
  const cam = result.cam?.length ? result.cam : null;
  const blank = cam !== null && cam.every((row) => row.every((value) => value === 0));
  $('heat').hidden = !cam;
  $('heat-controls').hidden = !cam || blank;
  if (cam) drawHeat($('heat'), cam, item.width ?? 1, item.height ?? 1);
  const notes = [];
  if (!item.url) notes.push('The image was not kept, or this browser cannot show its format.');
  if (!cam) notes.push('There is no heat-map for this result.');
  if (blank) notes.push('Nothing in particular spoke for this class: the heat-map is empty.');
  $('pictures-note').textContent = notes.join(' ');
  $('pictures-note').hidden = !notes.length;
  setHeat();
}

function setHeat() {
  const on = $('heat-on').checked;
  $('heat').style.opacity = on ? $('opacity').value / 100 : 0;
  $('opacity').disabled = !on;
  $('opacity-text').textContent = `${$('opacity').value} %`;
}

// Feedback

function showFeedback(result, classes, several) {
  $('thanks').textContent = '';
  $('thanks').className = 'thanks';
  $('correction').hidden = true;
  $('wrong').ariaExpanded = 'false';
  $('right').disabled = false;
  $('right').hidden = !classes.length;
  const names = Object.keys(result.prediction).sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  $('single').hidden = several;
  $('several').hidden = !several;
  $('true-class').replaceChildren(...names
    .filter((name) => several || !classes.includes(name))
    .map((name) => element('option', { value: name, textContent: name })));
  $('true-classes').replaceChildren(...(several ? names : []).map((name) => element('label', {},
    element('input', { type: 'checkbox', value: name, checked: classes.includes(name) }), name)));
}

async function say(trueClass) {
  const { id } = state.shown;
  $('thanks').className = 'thanks';
  $('thanks').textContent = 'Sending…';
  try {
    await feedback(id, trueClass);
    if (state.shown?.id !== id) return;
    $('thanks').textContent = 'Thank you: this is kept with the result.';
    $('correction').hidden = true;
    $('wrong').ariaExpanded = 'false';
  } catch (error) {
    $('thanks').classList.add('failed');
    $('thanks').textContent = error instanceof Failure ? error.message : 'This could not be sent.';
    if (error.status === 401) {
      state.retry = () => say(trueClass);
      askForKey();
    }
  }
}

// Where the answer comes from

function origin(result) {
  return [['Model', result.model_name], ['Version', result.model_version], ['Result', result.prediction_id]];
}

function showPassport(result) {
  $('passport').replaceChildren(...terms(origin(result)));
  $('copy').textContent = 'Copy the link to this result';
  fillPassport();
}

function terms(rows) {
  return rows.filter(([, value]) => value).flatMap(([name, value]) => [element('dt', { textContent: name }), element('dd', { textContent: value })]);
}

async function fillPassport() {
  const item = state.shown;
  if (!$('origin').open || !item) return;
  const { id } = item;
  try {
    const { model, prediction } = await passport(id);
    if (state.shown !== item) return;
    $('passport').replaceChildren(...terms([
      ...origin(item.result),
      ['Asked', new Date(prediction.created_on).toLocaleString()],
      ['Data', model && `${model.dataset_name} ${model.dvc_tag} (${model.dvc_md5.slice(0, 8)})`],
      ['Code', model?.git_commit?.slice(0, 10)],
      ['Training', model?.mlflow_run_id && `MLflow run ${model.mlflow_run_id.slice(0, 10)}`],
    ]));
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    $('passport').replaceChildren(...terms([...origin(item.result), ['More', error.message]]));
  }
}

// History: this tab only, and gone with it

function remember(item) {
  state.history = [item, ...state.history.filter((other) => other.id !== item.id)];
  for (const old of state.history.splice(HISTORY_LENGTH)) if (old.url?.startsWith('blob:')) URL.revokeObjectURL(old.url);
  const kept = state.history.map(({ id, thumb, result, label, width }) => ({ id, thumb, width, label: label ?? labelOf(result) }));
  try { sessionStorage.setItem(HISTORY, JSON.stringify(kept)); } catch { /* A full or missing storage only costs the history after a reload. */ }
}

function labelOf(result) {
  return { name: (result.predicted_classes ?? [result.predicted_class]).join(', ') || 'none', share: percent(ranked(result)[0][1]) };
}

function showHistory() {
  $('history').hidden = state.history.length < (state.shown ? 2 : 1);
  $('history-list').replaceChildren(...state.history.map((item) => {
    const { name, share } = item.label ?? labelOf(item.result);
    const picture = element('img', { alt: '', src: item.thumb ?? 'page/icon.svg', className: (item.width ?? TINY_PX) < TINY_PX ? 'tiny' : '' });
    const button = element('button', { type: 'button', onclick: () => open(item.id) }, picture,
      element('span', {}, element('b', { textContent: name }), element('span', { textContent: share })));
    if (item.id === state.shown?.id) button.setAttribute('aria-current', 'true');
    return element('li', {}, button);
  }));
}

// Wiring

function firstImage(items) {
  return [...(items ?? [])].map((item) => (item.kind === 'file' ? item.getAsFile() : null)).find(Boolean);
}

$('file').addEventListener('change', () => {
  const [file] = $('file').files;
  // Emptied, so that choosing the same file again is a change too.
  if (file) { send(file); $('file').value = ''; }
});
for (const type of ['dragenter', 'dragover']) {
  addEventListener(type, (event) => { event.preventDefault(); $('drop').classList.add('over'); });
}
addEventListener('dragleave', (event) => { if (!event.relatedTarget) $('drop').classList.remove('over'); });
addEventListener('drop', (event) => {
  event.preventDefault();
  $('drop').classList.remove('over');
  const file = firstImage(event.dataTransfer?.items);
  if (file) send(file);
  else complain(new Failure('That was not a file. Drop an image from a folder.'));
});
addEventListener('paste', (event) => {
  const file = firstImage(event.clipboardData?.items);
  if (file) send(file);
});
addEventListener('hashchange', openLink);
$('heat-on').addEventListener('change', setHeat);
$('opacity').addEventListener('input', setHeat);
$('right').addEventListener('click', () => { $('right').disabled = true; say(state.shown.result.predicted_class); });
$('wrong').addEventListener('click', () => {
  $('correction').hidden = !$('correction').hidden;
  $('wrong').ariaExpanded = String(!$('correction').hidden);
  if (!$('correction').hidden) ($('single').hidden ? $('true-classes').querySelector('input') : $('true-class')).focus();
});
$('feedback').addEventListener('submit', (event) => {
  event.preventDefault();
  const several = [...$('true-classes').querySelectorAll('input:checked')].map((box) => box.value);
  say($('single').hidden ? several.join('|') : $('true-class').value);
});
$('origin').addEventListener('toggle', fillPassport);
$('copy').addEventListener('click', async () => {
  const link = new URL(`#${state.shown.id}`, location.href).href;
  try {
    await navigator.clipboard.writeText(link);
    $('copy').textContent = 'Copied';
  } catch {
    // Without https there is no clipboard: the address bar has the link.
    $('copy').textContent = link;
  }
});
$('key-form').addEventListener('submit', () => {
  // Anything but plain ASCII cannot be a header's value, nor any key of this service.
  useKey($('key').value.trim().replace(/[^\x21-\x7e]/g, ''));
  if (state.retry) state.retry();
});
$('key-cancel').addEventListener('click', () => $('key-dialog').close());

function openLink() {
  const id = location.hash.slice(1);
  if (/^[0-9a-f-]{36}$/.test(id) && id !== state.shown?.id) open(id);
}

try { state.history = JSON.parse(sessionStorage.getItem(HISTORY) ?? '[]'); } catch { /* see remember */ }
showModel();
showHistory();
openLink();
