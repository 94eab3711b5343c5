// Small things that every part of the page needs: elements, and numbers in words.

export const $ = (id) => document.getElementById(id);

// Elements are made by hand and filled with textContent: class names, file names and messages are data, never markup.
export function element(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

export function percent(share) {
  if (share === null || share === undefined) return '–';
  const value = share * 100;
  if (value > 0 && value < 0.1) return '< 0.1 %';
  if (value < 100 && value > 99.9) return '> 99.9 %';
  return `${value.toFixed(value === 0 || value === 100 ? 0 : 1)} %`;
}

export function megabytes(bytes) {
  return bytes >= 1e6 ? `${Math.floor(bytes / 1e5) / 10} MB` : `${Math.floor(bytes / 1000)} kB`;
}

// Spoken by a screen reader, seen by nobody.
export function announce(text) {
  $('status').textContent = text;
}
