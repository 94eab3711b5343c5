// The API key: asked for when the service wants one, kept in this tab only.

import { currentKey, useKey } from './api.js';
import { $ } from './dom.js';

let asking = null;

function ask() {
  $('key-title').textContent = currentKey() === null ? 'This service needs a key' : 'That key was not accepted';
  $('key').value = '';
  $('key-dialog').returnValue = '';
  $('key-dialog').showModal();
  return new Promise((resolve) => {
    $('key-dialog').addEventListener('close', () => {
      const isGiven = $('key-dialog').returnValue === 'given';
      // Anything but plain ASCII cannot be a header's value, nor any key of this service.
      if (isGiven) useKey($('key').value.trim().replace(/[^\x21-\x7e]/g, ''));
      $('key').value = '';
      resolve(isGiven);
    }, { once: true });
  });
}

/** Does `work`, asking for a key and doing it again while the service answers 401; cancelled, the 401 is thrown. */
export async function withKey(work) {
  for (;;) {
    const used = currentKey();
    try {
      return await work();
    } catch (error) {
      if (error.status !== 401) throw error;
      // Several requests may be refused at once: one question for all, and none where the key is newer than the refusal.
      if (used !== currentKey()) continue;
      asking ??= ask().finally(() => { asking = null; });
      if (!(await asking)) throw error;
    }
  }
}

$('key-cancel').addEventListener('click', () => $('key-dialog').close());
