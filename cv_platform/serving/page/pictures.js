// The image beside the image with its heat-map, whose strength one can choose; and small copies for the list.

import { $, element } from './dom.js';
import { drawHeat } from './heatmap.js';

const TINY_PX = 128;
const THUMBNAIL_PX = 112;
// Frames follow the image's width / height between these.
const TALLEST = 0.7;
const WIDEST = 1.8;

// Enlarged pixel by pixel rather than blurred.
export const isTiny = (item) => Math.max(item.width ?? TINY_PX, item.height ?? TINY_PX) < TINY_PX;

async function decoded(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    return image;
  } catch {
    return null;
  }
}

/** Gives `item` the picture at `url`, its size and a small copy; false where the browser cannot read it. */
export async function usePicture(item, url) {
  const image = await decoded(url);
  if (!image) {
    if (url.startsWith('blob:')) URL.revokeObjectURL(url);
    return false;
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = Math.min(1, THUMBNAIL_PX / Math.max(width, height));
  const canvas = element('canvas', { width: Math.max(1, width * scale), height: Math.max(1, height * scale) });
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  Object.assign(item, { url, width, height, thumb: canvas.toDataURL('image/webp', 0.8) });
  return true;
}

export function forgetPicture(item) {
  if (item.url?.startsWith('blob:')) URL.revokeObjectURL(item.url);
  item.url = null;
}

export function showPictures(item) {
  const { cam: rows } = item.result;
  const proportions = Math.min(WIDEST, Math.max(TALLEST, (item.width ?? 1) / (item.height ?? 1)));
  for (const id of ['original', 'under']) {
    const image = $(id);
    image.parentElement.style.aspectRatio = proportions;
    image.hidden = !item.url;
    if (item.url) image.src = item.url; else image.removeAttribute('src');
    image.classList.toggle('tiny', isTiny(item));
  }
  const cam = rows?.length ? rows : null;
  const isBlank = cam !== null && cam.every((row) => row.every((value) => value === 0));
  $('heat').hidden = !cam;
  $('heat-controls').hidden = !cam || isBlank;
  if (cam) drawHeat($('heat'), cam, item.width ?? 1, item.height ?? 1);
  const notes = [];
  if (!item.url) notes.push('The image was not kept, or this browser cannot show its format.');
  if (!cam) notes.push('There is no heat-map for this result.');
  if (isBlank) notes.push('The heat-map is blank: no part of the image raises the class’s score by more than rounding does.');
  $('pictures-note').textContent = notes.join(' ');
  $('pictures-note').hidden = !notes.length;
  setHeat();
}

function setHeat() {
  const isOn = $('heat-on').checked;
  $('heat').style.opacity = isOn ? $('opacity').value / 100 : 0;
  $('opacity').disabled = !isOn;
  $('opacity-text').textContent = `${$('opacity').value} %`;
}

$('heat-on').addEventListener('change', setHeat);
$('opacity').addEventListener('input', setHeat);
