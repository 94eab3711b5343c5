// Talks to the service; every failure becomes a `Failure` with words for a person.

import { megabytes } from './dom.js';

const KEY = 'api-key';
const PATIENCE_MS = 120000;
const LONGEST_WAIT_S = 120;
const SILENT = 'The service does not answer. Is it running, and are you online?';
const SLOW = 'That took too long. Please try again.';

export class Failure extends Error {
  constructor(message, { detail = '', status = 0, retryAfter = null } = {}) {
    super(message);
    this.detail = detail;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// A tab without storage (some private modes) still works: the key is then asked for again after a reload.
let key = null;
try { key = sessionStorage.getItem(KEY); } catch { /* see above */ }

export const currentKey = () => key;

export function useKey(value) {
  key = value;
  try { sessionStorage.setItem(KEY, value); } catch { /* see above */ }
}

function inWords(status, body) {
  switch (status) {
    case 400: return 'This file is empty or incomplete. Please choose it again.';
    case 401: return 'This service needs a key.';
    case 403: return 'This key does not open this.';
    case 404: return 'There is no such result any more.';
    case 408: return 'Sending the image took too long. Please try again, or choose a smaller one.';
    case 413: return body.max_bytes
      ? `This image is too large: at most ${megabytes(body.max_bytes)} are allowed.`
      : 'This image has too many pixels. Please make it smaller.';
    case 415: return 'This file is not an image that can be read. JPEG, PNG, WebP, BMP, TIFF and GIF work.';
    case 422: return 'The service did not understand this.';
    case 429: return 'The service is very busy right now. Please try again in a moment.';
    case 503: return 'The service cannot answer at the moment. Please try again soon.';
    case 504: return SLOW;
    default: return 'Something went wrong in the service.';
  }
}

// Retry-After may also be a date, which no route of this service sends.
function seconds(header) {
  const value = Number(header);
  return header && value >= 0 ? Math.min(Math.max(value, 1), LONGEST_WAIT_S) : null;
}

function failure(status, body, retryAfter) {
  return new Failure(inWords(status, body), { detail: body.message ?? '', status, retryAfter: seconds(retryAfter) });
}

function parsed(text) {
  try { return JSON.parse(text) ?? {}; } catch { return {}; }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers['X-API-Key'] = key;
  let answer;
  let body;
  try {
    answer = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(PATIENCE_MS) });
    body = parsed(await answer.text());
  } catch (error) {
    throw new Failure(error.name === 'TimeoutError' ? SLOW : SILENT);
  }
  if (!answer.ok && path !== 'health_check') throw failure(answer.status, body, answer.headers.get('Retry-After'));
  return body;
}

export const health = () => call('health_check');
export const stored = (id) => call(`predictions/${encodeURIComponent(id)}`);
export const passport = (id) => call(`predictions/${encodeURIComponent(id)}/passport`);

/** Says what an image shows: some of the classes, or, with an empty list, none of them. */
export function feedback(id, classes) {
  const said = classes.length ? { true_class: classes.join('|') } : { none_of_these: true };
  return call(`feedback/${encodeURIComponent(id)}`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...said, source: 'page' }),
  });
}

const label = (id) => `labels/${encodeURIComponent(id)}`;
export const labelTasks = (mode, limit, passed) => call(`labels?${new URLSearchParams([['mode', mode], ['limit', limit], ...passed.map((id) => ['passed', id])])}`);
export const labelTask = (id) => call(label(id));
export const agreement = () => call('labels/agreement');
export const skipLabel = (id) => call(`${label(id)}/skip`, { method: 'POST' });
export const withdrawLabel = (id) => call(label(id), { method: 'DELETE' });

/** Labels an image with some of the classes, or, with an empty list, with none of them. */
export const addLabel = (id, classes) => call(label(id), {
  method: 'POST',
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify(classes.length ? { true_class: classes.join('|') } : { none_of_these: true }),
});

/** Sends one image; `onSent` hears the share that has left, 0 to 1. `fetch` cannot tell that, an XMLHttpRequest can. */
export function predict(file, onSent) {
  const form = new FormData();
  form.append('file', file, file.name || 'image');
  form.append('explain', 'cam');
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open('POST', 'predict');
    request.timeout = PATIENCE_MS;
    if (key) request.setRequestHeader('X-API-Key', key);
    request.upload.addEventListener('progress', (event) => event.lengthComputable && onSent(event.loaded / event.total));
    request.upload.addEventListener('load', () => onSent(1));
    request.addEventListener('error', () => reject(new Failure(SILENT)));
    request.addEventListener('timeout', () => reject(new Failure(SLOW)));
    request.addEventListener('load', () => {
      const body = parsed(request.responseText);
      if (request.status === 200) resolve(body);
      else reject(failure(request.status, body, request.getResponseHeader('Retry-After')));
    });
    request.send(form);
  });
}
