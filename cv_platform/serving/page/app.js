// The page: images come in, wait their turn, and become answers that one can look at, link to and correct.

import { Failure, health, predict, stored } from './api.js';
import { $, announce, megabytes } from './dom.js';
import { askForFeedback } from './feedback.js';
import { takeImages } from './intake.js';
import { withKey } from './key.js';
import { complain, quiet } from './notice.js';
import { usePicture } from './pictures.js';
import { Queue } from './queue.js';
import { hideResult, labelOf, shownItem, showResult } from './result.js';
import { enlist, keep, known, markShown, startSession, update } from './session.js';

const MOST_AT_ONCE = 100;
const ID = /^#([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$/;
let maxBytes = null;
let modelVersion = null;
let turn = 0;

// What the model is, and whether it is there

async function showModel() {
  try {
    const status = await health();
    const isReady = Boolean(status.model_name && status.model_version);
    modelVersion = status.model_version;
    $('model').dataset.state = isReady ? 'ready' : 'away';
    $('model-text').textContent = isReady ? `${status.model_name}, version of ${madeOn(modelVersion)}` : 'No model is deployed yet';
    $('model').title = modelVersion ?? '';
    maxBytes = status.max_upload_bytes ?? null;
    if (maxBytes) $('drop-limit').textContent = `, up to ${megabytes(maxBytes)} each`;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    $('model').dataset.state = 'away';
    $('model-text').textContent = navigator.onLine ? 'The service does not answer' : 'You are offline';
  }
}

// Versions begin with the time they were made: 20260131T060000Z-1f3c9a2e.
function madeOn(version) {
  const parts = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z/.exec(version);
  if (!parts) return version;
  const [, year, month, day, hour, minute, second] = parts.map(Number);
  return new Date(Date.UTC(year, month - 1, day, hour, minute, second)).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
}

// Sending: one request per image

const queue = new Queue({ work: classify, settled, postponed, paused });

function take(files) {
  quiet();
  const items = files.slice(0, MOST_AT_ONCE).map((file) => ({ file, name: file.name || 'pasted image', state: 'waiting', sent: 0 }));
  if (files.length > MOST_AT_ONCE) complain(new Failure(`Only the first ${MOST_AT_ONCE} of ${files.length} images were taken.`));
  announce(items.length === 1 ? 'The model is looking at the image…' : `${items.length} images are on their way.`);
  begin(items);
  enlist(items);
  queue.add(items);
}

function again(item) {
  quiet();
  Object.assign(item, { state: 'waiting', sent: 0, error: null });
  begin([item]);
  update(item);
  queue.add([item]);
}

function begin(items) {
  const batch = { items, turn: turn += 1 };
  for (const item of items) item.batch = batch;
}

async function classify(item) {
  const { file } = item;
  if (maxBytes && file.size > maxBytes) {
    throw new Failure(`This image is too large: at most ${megabytes(maxBytes)} are allowed.`, { status: 413 });
  }
  // The browser would call a file that has gone, or that may not be read, a network error.
  await file.slice(0, 1).arrayBuffer().catch(() => { throw new Failure('This file cannot be read any more.', { status: 400 }); });
  const isReadable = item.url ? true : await usePicture(item, URL.createObjectURL(file));
  Object.assign(item, { state: 'sending', sent: 0 });
  update(item);
  const result = await withKey(() => predict(file, (sent) => {
    Object.assign(item, sent < 1 ? { state: 'sending', sent } : { state: 'looking' });
    update(item);
  }));
  Object.assign(item, { id: result.prediction_id, result, label: labelOf(result), file: null });
  // Some formats (TIFF) are readable for the service but not for the browser: the stored picture is shown instead.
  if (!isReadable) await useStoredPicture(item);
}

function settled(item, error) {
  const { items } = item.batch;
  const isDone = ({ state }) => state === 'done' || state === 'failed';
  if (error) {
    item.error = error instanceof Failure ? error : new Failure('Something went wrong in this page.', { detail: String(error) });
    item.state = 'failed';
    update(item);
    // Without the key that was asked for, all others would only ask again.
    if (item.error.status === 401) for (const other of queue.drain()) settled(other, item.error);
  } else {
    item.state = 'done';
    update(item);
    keep();
    const { name, share } = item.label;
    const progress = items.length > 1 ? ` ${items.filter(isDone).length} of ${items.length} done.` : '';
    announce(`${item.name}: ${name}${share && `, ${share}`}.${progress}`);
    if (item.result.model_version !== modelVersion) showModel();
  }
  lead(item.batch);
  if (items.every(isDone)) report(item.batch);
}

// The first good answer of a batch is shown; the others wait in the list, lest they push each other away.
function lead(batch) {
  const first = batch.items.find(({ state }) => state !== 'failed');
  if (batch.turn !== turn || first?.state !== 'done') return;
  turn += 1;
  show(first);
}

function report({ items, turn: theirs }) {
  const failed = items.filter(({ state }) => state === 'failed');
  if (!failed.length) return;
  // An earlier answer below the complaint would look like the answer to this image; the list still has it.
  if (failed.length === items.length && theirs === turn) { hideResult(); markShown(null); }
  complain(items.length === 1 ? failed[0].error : new Failure(`${failed.length} of ${items.length} images could not be classified. The list below says why.`));
}

function postponed(item) {
  item.state = 'waiting';
  update(item);
}

function paused(seconds) {
  if (seconds && $('pause').hidden) announce(`The service is busy. It asks to wait ${seconds} seconds.`);
  $('pause').hidden = !seconds;
  $('pause').textContent = seconds ? `The service is busy. Going on in ${seconds} s…` : '';
}

// Showing

function show(item) {
  showResult(item);
  markShown(item);
  if (matchMedia('(max-width: 820px)').matches) $('result').scrollIntoView({ block: 'start' });
}

async function useStoredPicture(item) {
  const result = item.result.original_img === undefined ? await stored(item.id).catch(() => ({})) : item.result;
  if (result.original_img) await usePicture(item, `data:${result.media_type};base64,${result.original_img}`);
}

async function open(item) {
  const mine = turn += 1;
  quiet();
  try {
    if (!item.result) {
      document.body.classList.add('busy');
      announce('Opening the result…');
      item.result = await withKey(() => stored(item.id));
      item.label = labelOf(item.result);
      await useStoredPicture(item);
    }
    if (!known(item.id)) { enlist([Object.assign(item, { state: 'done' })]); keep(); }
    if (mine !== turn) return;
    show(item);
    const { name, share } = item.label;
    announce(`${$('over').textContent} ${name}${share && `, ${share}`}.`);
  } catch (error) {
    if (mine !== turn) return;
    hideResult();
    markShown(null);
    complain(error);
  } finally {
    document.body.classList.remove('busy');
  }
}

function openLink() {
  const id = ID.exec(location.hash)?.[1];
  if (id && id !== shownItem()?.id) open(known(id) ?? { id });
}

takeImages(take);
askForFeedback(keep);
startSession({
  open,
  retry: again,
  cleared: () => { if (!shownItem()) return; hideResult(); history.replaceState(null, '', location.pathname + location.search); },
});
addEventListener('hashchange', openLink);
for (const type of ['online', 'offline']) addEventListener(type, showModel);
showModel();
openLink();
