// "Is that right?": what the image really shows, sent to the service.

import { Failure, feedback } from './api.js';
import { $, element } from './dom.js';
import { withKey } from './key.js';

const NONE = 'none of these';

let shown = null;
let remember = () => {};

function say(text, { hasFailed = false } = {}) {
  $('thanks').textContent = text;
  $('thanks').classList.toggle('failed', hasFailed);
}

function openCorrection(isOpen) {
  $('correction').hidden = !isOpen;
  $('wrong').setAttribute('aria-expanded', String(isOpen));
}

export function showFeedback(item) {
  shown = item;
  const { prediction, predicted_classes: classes, classifier_type: type } = item.result;
  const isSeveral = type === 'multi-label';
  const names = Object.keys(prediction).sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  say(item.said ? `You said: ${item.said}. The latest word counts.` : '');
  openCorrection(false);
  $('single').hidden = isSeveral;
  $('several').hidden = !isSeveral;
  $('true-class').replaceChildren(...names
    .filter((name) => !classes.includes(name))
    .map((name) => element('option', { value: name, textContent: name })));
  $('true-classes').replaceChildren(...(isSeveral ? names : []).map((name) => element('label', {},
    element('input', { type: 'checkbox', value: name, checked: classes.includes(name) }), name)));
}

async function send(classes) {
  const item = shown;
  const inWords = classes.join(', ') || NONE;
  say('Sending…');
  try {
    await withKey(() => feedback(item.id, classes));
    item.said = inWords;
    remember();
    if (shown !== item) return;
    say(`Thank you. Kept with the result: ${inWords}.`);
    openCorrection(false);
  } catch (error) {
    if (shown === item) say(error instanceof Failure ? error.message : 'This could not be sent.', { hasFailed: true });
  }
}

/** Wires the form; `afterwards` is called when something was said of a result. */
export function askForFeedback(afterwards) {
  remember = afterwards;
  $('right').addEventListener('click', () => send(shown.result.predicted_classes));
  $('none').addEventListener('click', () => send([]));
  $('wrong').addEventListener('click', () => {
    openCorrection($('correction').hidden);
    if (!$('correction').hidden) ($('single').hidden ? $('true-classes').querySelector('input') : $('true-class')).focus();
  });
  $('feedback').addEventListener('submit', (event) => {
    event.preventDefault();
    const chosen = $('single').hidden
      ? [...$('true-classes').querySelectorAll('input:checked')].map((box) => box.value)
      : [$('true-class').value];
    if (chosen.length) send(chosen);
    else say('Choose at least one class, or press “None of these”.', { hasFailed: true });
  });
}
