// The camera: asked for on a click only, shown, photographed, let go.

import { Failure } from './api.js';
import { $, announce } from './dom.js';
import { complain, quiet } from './notice.js';

const JPEG_QUALITY = 0.92;
const REASONS = {
  NotAllowedError: 'The camera was refused. Allow it beside the browser’s address, then try again.',
  NotFoundError: 'No camera was found on this device.',
  NotReadableError: 'The camera is in use by another program, or cannot be started.',
};
let stream = null;
let isAsking = false;

function reason(error) {
  return new Failure(REASONS[error.name] ?? 'The camera cannot be used.', { detail: REASONS[error.name] ? '' : error.message });
}

async function start() {
  if (isAsking || stream) return;
  quiet();
  if (!navigator.mediaDevices?.getUserMedia) {
    complain(new Failure(isSecureContext
      ? 'This browser gives pages no camera.'
      : 'The camera needs a secure address: browsers give it to pages from https:// or localhost only.'));
    return;
  }
  isAsking = true;
  announce('Waiting for the camera…');
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment', width: { ideal: 1280 } }, audio: false });
  } catch (error) {
    announce('');
    complain(reason(error));
    return;
  } finally {
    isAsking = false;
  }
  stream.getVideoTracks()[0].addEventListener('ended', () => { stop(); complain(new Failure('The camera was switched off.')); });
  $('video').srcObject = stream;
  $('camera').hidden = false;
  $('camera-start').setAttribute('aria-expanded', 'true');
}

function stop() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
  $('video').srcObject = null;
  $('snap').disabled = true;
  $('camera').hidden = true;
  $('camera-start').setAttribute('aria-expanded', 'false');
}

function photograph(take) {
  const video = $('video');
  const canvas = Object.assign(document.createElement('canvas'), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext('2d').drawImage(video, 0, 0);
  const name = `camera ${new Date().toLocaleTimeString()}.jpg`;
  canvas.toBlob((blob) => blob && take(new File([blob], name, { type: 'image/jpeg' })), 'image/jpeg', JPEG_QUALITY);
}

/** Wires the camera's buttons; `take` gets each photograph as a file. */
export function useCamera(take) {
  $('camera-start').addEventListener('click', () => (stream ? stop() : start()));
  $('camera-stop').addEventListener('click', () => { stop(); announce('The camera is off.'); $('camera-start').focus(); });
  $('snap').addEventListener('click', () => photograph(take));
  // Also fires when the picture goes on after a pause: only the first time is news.
  $('video').addEventListener('playing', () => {
    if (!$('snap').disabled) return;
    $('snap').disabled = false;
    $('snap').focus();
    announce('The camera is on.');
  });
  addEventListener('pagehide', stop);
}
