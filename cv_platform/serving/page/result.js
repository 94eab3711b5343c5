// One answer: the verdict, the classes as bars, and where it comes from.

import { Failure, passport } from './api.js';
import { $, element, percent } from './dom.js';
import { showFeedback } from './feedback.js';
import { withKey } from './key.js';
import { showPictures } from './pictures.js';

const SHOWN_BARS = 5;
const TITLE = document.title;
let shown = null;

function ranked(result) {
  return Object.entries(result.prediction).sort((a, b) => b[1] - a[1]);
}

/** The answer in a few words, for the list and the screen reader. */
export function labelOf(result) {
  const classes = result.predicted_classes;
  const [, share] = ranked(result)[0];
  return { name: classes.join(', ') || 'none of the known classes', share: classes.length > 1 ? '' : percent(share) };
}

export const shownItem = () => shown;

export function hideResult() {
  shown = null;
  $('result').hidden = true;
  document.title = TITLE;
}

export function showResult(item) {
  shown = item;
  const { result } = item;
  const { name } = labelOf(result);
  document.body.classList.add('has-result');
  $('result').hidden = false;
  $('over').textContent = result.classifier_type === 'multi-label' ? 'This shows' : 'This is most likely';
  $('verdict').textContent = name;
  document.title = `${name} – ${TITLE}`;
  $('file-name').textContent = item.name ?? '';
  // A result that is read again does not say it: null.
  $('unknown').hidden = !result.is_unknown;
  showBars(result, false);
  showPictures(item);
  showFeedback(item);
  $('passport').replaceChildren(...terms(origin(result)));
  $('copy').textContent = 'Copy the link to this result';
  fillPassport();
  history.replaceState(null, '', `#${item.id}`);
}

function showBars(result, isAll) {
  const entries = ranked(result);
  const chosen = result.predicted_classes;
  const count = isAll ? entries.length : Math.max(SHOWN_BARS, Math.min(chosen.length, entries.length));
  $('bars').replaceChildren(...entries.slice(0, count).map(([name, share]) => {
    const bar = element('i');
    bar.style.width = `${(share ?? 0) * 100}%`;
    return element('li', { className: chosen.includes(name) ? 'chosen' : '' },
      element('span', { className: 'name', textContent: name }),
      element('span', { className: 'share', textContent: percent(share) }),
      element('span', { className: 'track', ariaHidden: 'true' }, bar));
  }));
  $('more').hidden = entries.length <= SHOWN_BARS;
  $('more').textContent = isAll ? 'Show fewer classes' : `Show all ${entries.length} classes`;
  $('more').setAttribute('aria-expanded', String(isAll));
  $('more').onclick = () => showBars(result, !isAll);
}

function origin(result) {
  return [['Model', result.model_name], ['Version', result.model_version], ['Result', result.prediction_id]];
}

function terms(rows) {
  return rows.filter(([, value]) => value).flatMap(([name, value]) => [element('dt', { textContent: name }), element('dd', { textContent: value })]);
}

async function fillPassport() {
  const item = shown;
  if (!$('origin').open || !item) return;
  try {
    const { model, prediction } = await withKey(() => passport(item.id));
    if (shown !== item) return;
    $('passport').replaceChildren(...terms([
      ...origin(item.result),
      ['Asked', new Date(prediction.created_on).toLocaleString()],
      ['Data', model && `${model.ds_name} ${model.dvc_tag} (${model.dvc_md5.slice(0, 8)})`],
      ['Code', model?.git_commit?.slice(0, 10)],
      ['Training', model?.mlflow_run_id && `MLflow run ${model.mlflow_run_id.slice(0, 10)}`],
    ]));
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (shown === item) $('passport').replaceChildren(...terms([...origin(item.result), ['More', error.message]]));
  }
}

$('origin').addEventListener('toggle', fillPassport);
$('copy').addEventListener('click', async () => {
  const link = new URL(`#${shown.id}`, location.href).href;
  try {
    await navigator.clipboard.writeText(link);
    $('copy').textContent = 'Copied';
  } catch {
    // Without https there is no clipboard: the address bar has the link.
    $('copy').textContent = link;
  }
});
