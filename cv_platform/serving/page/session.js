// The list of this session: images that wait, are under way, answered or failed. This tab only, and gone with it.

import { $, element } from './dom.js';
import { forgetPicture, isTiny } from './pictures.js';

const STORED = 'history';
const MOST_ITEMS = 100;
const AGAIN = new Set([0, 401, 408, 429, 500, 502, 503, 504]);

let items = [];
const rows = new Map();
let act = { open: () => {}, retry: () => {} };

export const known = (id) => items.find((item) => item.id === id);

/** Puts new items on top, the first of them uppermost. */
export function enlist(added) {
  items = [...added, ...items];
  for (const old of items.splice(MOST_ITEMS)) drop(old);
  for (const item of [...added].reverse()) {
    rows.set(item, element('li'));
    $('history-list').prepend(rows.get(item));
  }
  added.forEach(update);
}

function drop(item) {
  rows.get(item)?.remove();
  rows.delete(item);
  forgetPicture(item);
}

function dismiss(item) {
  items = items.filter((other) => other !== item);
  drop(item);
  count();
  $('history-title').focus();
}

/** Shows what has become of `item`, if it is still listed. */
export function update(item) {
  const row = rows.get(item);
  if (!row) return;
  const hadFocus = row.contains(document.activeElement);
  // A bar that grows is not worth a new row, and a new row would take the focus away.
  if (row.dataset.state !== item.state || item.state === 'done' || item.state === 'failed') {
    row.dataset.state = item.state;
    row.replaceChildren(...contents(item));
    if (hadFocus) (row.querySelector('button') ?? $('history-title')).focus();
  }
  const bar = row.querySelector('progress');
  if (bar && item.state === 'sending') bar.value = item.sent;
  count();
}

function contents(item) {
  const { name } = item;
  const picture = element('img', { alt: '', src: item.thumb ?? 'page/icon.svg', className: `${isTiny(item) ? 'tiny' : ''} ${item.thumb ? '' : 'none'}` });
  const words = (title, text, ...more) => element('span', { className: 'words' },
    element('b', { textContent: title }), element('span', { className: 'text', textContent: text }), ...more);
  if (item.state === 'done') {
    const { name: verdict, share } = item.label;
    return [element('button', { type: 'button', className: 'entry', onclick: () => act.open(item) }, picture,
      words(verdict, name ?? 'Opened by its link'), element('span', { className: 'share', textContent: share }))];
  }
  if (item.state === 'failed') {
    const buttons = [element('button', { type: 'button', textContent: 'Remove', ariaLabel: `Remove ${name}`, onclick: () => dismiss(item) })];
    if (AGAIN.has(item.error.status) && item.file) {
      buttons.unshift(element('button', { type: 'button', textContent: 'Try again', ariaLabel: `Try again: ${name}`, onclick: () => act.retry(item) }));
    }
    return [element('div', { className: 'entry' }, picture, words(name, item.error.message, element('span', { className: 'buttons' }, ...buttons)))];
  }
  const text = { waiting: 'Waiting', sending: 'Sending…', looking: 'The model is looking…' }[item.state];
  const bar = element('progress', { max: 1, ariaLabel: `${name}: ${text}` });
  if (item.state === 'waiting') bar.value = 0;
  return [element('div', { className: 'entry' }, picture, words(name, text, bar))];
}

function count() {
  const under = items.filter(({ state }) => !['done', 'failed'].includes(state)).length;
  $('history').hidden = items.length === 0;
  $('history-count').textContent = under ? `${items.length - under} of ${items.length} done` : '';
  $('clear').hidden = under > 0;
}

export function markShown(shown) {
  for (const [item, row] of rows) {
    const button = row.querySelector('button.entry');
    if (item === shown) button?.setAttribute('aria-current', 'true'); else button?.removeAttribute('aria-current');
  }
}

/** Keeps the answered items for a reload of this tab. */
export function keep() {
  const kept = items.filter(({ state }) => state === 'done')
    .map(({ id, name, thumb, width, height, label, said }) => ({ id, name, thumb, width, height, label, said }));
  try { sessionStorage.setItem(STORED, JSON.stringify(kept)); } catch { /* A full or missing storage only costs the list after a reload. */ }
}

/** Shows the list and what an earlier page of this tab has kept; `open` and `retry` get the item that was clicked. */
export function startSession({ open, retry, cleared }) {
  act = { open, retry };
  $('clear').addEventListener('click', () => {
    items.splice(0).forEach(drop);
    keep();
    count();
    cleared();
  });
  try {
    enlist(JSON.parse(sessionStorage.getItem(STORED) ?? '[]').map((item) => ({ ...item, state: 'done' })));
  } catch { /* see keep */ }
}
