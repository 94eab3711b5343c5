// What went wrong, in plain words, where everybody sees and hears it.

import { Failure } from './api.js';
import { $ } from './dom.js';

export function complain(error) {
  const failure = error instanceof Failure ? error : new Failure('Something went wrong in this page.', { detail: String(error) });
  $('notice-text').textContent = failure.message;
  $('notice-detail').textContent = failure.detail;
  $('notice').hidden = false;
}

export function quiet() {
  $('notice').hidden = true;
  $('notice-text').textContent = '';
  $('notice-detail').textContent = '';
}
