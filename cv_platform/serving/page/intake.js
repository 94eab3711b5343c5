// The ways in for images: chosen, dropped, pasted, photographed.

import { Failure } from './api.js';
import { useCamera } from './camera.js';
import { $ } from './dom.js';
import { complain } from './notice.js';

function filesOf(transfer) {
  return [...(transfer?.items ?? [])]
    .filter((item) => item.kind === 'file' && !item.webkitGetAsEntry?.()?.isDirectory)
    .map((item) => item.getAsFile())
    .filter(Boolean);
}

/** Wires everything that brings images; `take` gets them as a list of files. */
export function takeImages(take) {
  $('file').addEventListener('change', () => {
    const files = [...$('file').files];
    // Emptied, so that choosing the same file again is a change too.
    $('file').value = '';
    if (files.length) take(files);
  });
  // The whole field opens the chooser for a mouse; a keyboard has the file input itself.
  $('drop').addEventListener('click', (event) => { if (!event.target.closest('button, label, input')) $('file').click(); });
  for (const type of ['dragenter', 'dragover']) {
    addEventListener(type, (event) => { event.preventDefault(); $('drop').classList.add('over'); });
  }
  addEventListener('dragleave', (event) => { if (!event.relatedTarget) $('drop').classList.remove('over'); });
  addEventListener('drop', (event) => {
    event.preventDefault();
    $('drop').classList.remove('over');
    const files = filesOf(event.dataTransfer);
    if (files.length) take(files);
    else complain(new Failure('That was no image file. Drop images from a folder, not the folder itself.'));
  });
  addEventListener('paste', (event) => {
    const files = filesOf(event.clipboardData);
    // Not while the key is asked for.
    if (files.length && !document.querySelector('dialog[open]')) take(files);
  });
  useCamera((photograph) => take([photograph]));
}
