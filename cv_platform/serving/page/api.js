// Talks to the service; every failure becomes a `Failure` with words for a person.

const KEY = 'api-key';
const PATIENCE_MS = 60000;

export class Failure extends Error {
  constructor(message, { detail = '', status = 0 } = {}) {
    super(message);
    this.detail = detail;
    this.status = status;
  }
}

// A tab without storage (some private modes) still works: the key is then asked for again after a reload.
let key = null;
try { key = sessionStorage.getItem(KEY); } catch { /* see above */ }

export const hasKey = () => key !== null;

export function useKey(value) {
  key = value;
  try { sessionStorage.setItem(KEY, value); } catch { /* see above */ }
}

function megabytes(bytes) {
  return bytes >= 1e6 ? `${Math.round(bytes / 1e5) / 10} MB` : `${Math.round(bytes / 1000)} kB`;
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
    case 429: return 'Many people are sending images right now. Please try again in a moment.';
    case 503: return 'The service cannot answer at the moment. Please try again soon.';
    case 504: return 'That took too long. Please try again.';
    default: return 'Something went wrong in the service.';
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers['X-API-Key'] = key;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(PATIENCE_MS) });
  } catch (error) {
    throw new Failure(
      error.name === 'TimeoutError' ? 'That took too long. Please try again.' : 'The service does not answer. Is it running, and are you online?',
    );
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok && path !== 'health_check') {
    throw new Failure(inWords(answer.status, body), { detail: body.message ?? '', status: answer.status });
  }
  return body;
}

export const health = () => call('health_check');
export const stored = (id) => call(`predictions/${encodeURIComponent(id)}`);
export const passport = (id) => call(`predictions/${encodeURIComponent(id)}/passport`);

export function predict(file) {
  const form = new FormData();
  form.append('file', file, file.name || 'image');
  form.append('explain', 'cam');
  return call('predict', { method: 'POST', body: form });
}

export function feedback(id, trueClass) {
  return call(`feedback/${encodeURIComponent(id)}`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ true_class: trueClass, source: 'page' }),
  });
}
