// Renders openapi.json: what each route takes, answers and costs in credentials, with an example to copy.

import { Failure } from './api.js';
import { $, element } from './dom.js';
import { complain } from './notice.js';

const LOCKS = { adminToken: 'admin token', apiKey: 'API key, if set' };

// `this` becomes code; everything else stays text.
function prose(text) {
  return text.split('`').map((part, i) => (i % 2 ? element('code', { textContent: part }) : part));
}

const code = (text) => element('pre', { tabIndex: 0 }, element('code', { textContent: text }));
const json = (value) => code(JSON.stringify(value, null, 2));

function table(rows) {
  const lines = rows.map((cells) => element('tr', {}, ...cells.map((text) => element('td', { textContent: text }))));
  return element('div', { className: 'table' }, element('table', {}, element('tbody', {}, ...lines)));
}

function resolve(spec, schema) {
  const name = schema?.$ref?.split('/').pop();
  return name ? spec.components.schemas[name] : schema ?? {};
}

function kind(schema) {
  if (schema.type === 'array' && schema.items) return `several: ${kind(schema.items)}`;
  if (schema.enum) return schema.enum.join(' | ');
  if (schema.anyOf) return schema.anyOf.map(kind).filter((k) => k !== 'null').join(' or ');
  return [schema.type, schema.format ?? schema.contentMediaType].filter(Boolean).join(', ');
}

function inputs(spec, operation) {
  const rows = (operation.parameters ?? []).map((p) => [
    p.name, `${p.in}${p.required ? '' : ', optional'}`, kind(p.schema ?? {}), p.description ?? '',
  ]);
  for (const [type, { schema }] of Object.entries(operation.requestBody?.content ?? {})) {
    const body = resolve(spec, schema);
    for (const [name, field] of Object.entries(body.properties ?? {})) {
      rows.push([name, `${type}${body.required?.includes(name) ? '' : ', optional'}`, kind(field), field.description ?? field.items?.description ?? '']);
    }
  }
  return rows;
}

function curl(path, verb, operation) {
  const parts = ['curl'];
  if (verb !== 'get') parts.push(`-X ${verb.toUpperCase()}`);
  if (JSON.stringify(operation.security ?? []).includes('adminToken')) parts.push('-H "Authorization: Bearer $CV_ADMIN_TOKEN"');
  const content = operation.requestBody?.content ?? {};
  const form = content['multipart/form-data']?.schema;
  for (const name of form?.required ?? []) {
    parts.push(`-F ${name}=@image.jpg`);
    if (form.properties[name].type === 'array') parts.push(`-F ${name}=@another.jpg`);
  }
  const example = content['application/json']?.example;
  if (example) parts.push(`-H 'Content-Type: application/json' -d '${JSON.stringify(example)}'`);
  const filled = (operation.parameters ?? []).filter((p) => p.in === 'path').reduce((at, p) => at.replace(`{${p.name}}`, p.example ?? `{${p.name}}`), path);
  parts.push(new URL(`.${filled}`, location.href).href);
  return parts.join(' ');
}

function route(spec, path, verb, operation) {
  const locks = (operation.security ?? []).flatMap((one) => Object.keys(one)).map((name) => LOCKS[name] ?? name);
  const body = element('div', { className: 'body' });
  if (operation.description) body.append(element('p', {}, ...prose(operation.description)));
  const rows = inputs(spec, operation);
  if (rows.length) body.append(element('h3', { textContent: 'Takes' }), table(rows));
  body.append(element('h3', { textContent: 'Example' }), code(curl(path, verb, operation)));
  const answers = Object.entries(operation.responses ?? {});
  body.append(element('h3', { textContent: 'Answers' }), table(answers.map(([status, { description }]) => [status, description])));
  // Refusals all look alike: the first stands for the others.
  const examples = answers.map(([status, answer]) => [status, answer.content?.['application/json']?.example]).filter(([, example]) => example);
  const isGood = ([status]) => status.startsWith('2');
  for (const [status, example] of [...examples.filter(isGood), ...examples.filter((one) => !isGood(one)).slice(0, 1)]) {
    body.append(element('h3', { textContent: `Example of ${status}` }), json(example));
  }
  return element('details', { className: 'card route' },
    element('summary', {},
      element('span', { className: `verb ${verb}`, textContent: verb.toUpperCase() }),
      element('span', { className: 'path', textContent: path }),
      element('span', { className: 'says', textContent: operation.summary ?? '' }),
      ...locks.map((name) => element('span', { className: 'lock', textContent: name }))),
    body);
}

async function render() {
  const spec = await (await fetch('openapi.json')).json();
  $('title').textContent = spec.info.title;
  document.title = spec.info.title;
  $('about').replaceChildren(...prose(spec.info.description ?? ''));
  const groups = new Map();
  for (const [path, verbs] of Object.entries(spec.paths)) {
    for (const [verb, operation] of Object.entries(verbs)) {
      const group = operation.tags?.[0] ?? 'other';
      groups.set(group, [...(groups.get(group) ?? []), route(spec, path, verb, operation)]);
    }
  }
  $('routes').replaceChildren(...[...groups].map(([name, routes]) => element('section', {}, element('h2', { textContent: name }), ...routes)));
}

render().catch((error) => complain(new Failure('The description of the API cannot be shown.', { detail: error.message })));
