// The page of reward/annotate.py. Gradio runs this with `element` (the component) and `server` (its functions).
// All HTML comes escaped from the server (`shown` in annotate.py); what is made here is made of text nodes and numbers.
const root = element.querySelector('#annotate');
const NAME = 'annotator';  // kept for this tab: a reload goes on, and another tab may be another annotator
let annotator = sessionStorage.getItem(NAME) || (window.gradio_config && window.gradio_config.username) || '';
let page = null, groups = [], tie = false, busy = false;

const find = (selector) => root.querySelector(selector);
const make = (tag, className, text) => Object.assign(document.createElement(tag), {className, textContent: text ?? ''});
const ranked = () => groups.flat();

function say(text, bad) {
  const line = find('.said');
  if (line) { line.textContent = text || ''; line.classList.toggle('bad', !!bad); }
}

async function ask(what) {
  if (busy) return;
  busy = true;
  paint();
  let answer;
  try {
    answer = await server.act({...what, annotator});
    if (!answer || typeof answer !== 'object' || answer.error) throw new Error('no answer');
  } catch (error) {
    answer = {refused: 'Not saved: the server does not answer. Your choice is still here: try again, or reload the page.'};
  }
  busy = false;
  if (answer.refused) {
    if (!page) welcome();
    paint();
    say(answer.refused, true);
    return;
  }
  page = answer;
  annotator = page.annotator;
  sessionStorage.setItem(NAME, annotator);
  show();
}

function welcome() {
  root.innerHTML = '<form class="start"><label>Your name <input class="name" maxlength="60" autocomplete="off"></label>'
    + '<button>Start</button><div>The guidelines above say what counts, and the keys.</div><div class="said" role="alert"></div></form>';
  find('.name').value = annotator;
  find('.name').focus();
  find('form').addEventListener('submit', (event) => {
    event.preventDefault();
    annotator = find('.name').value;
    ask({do: 'start'});
  });
}

function show() {
  groups = [];
  tie = false;
  root.innerHTML = '<div class="bar"><span class="who"></span><span class="asked"></span><span class="progress"></span>'
    + '<div class="track"><div></div></div></div><div class="work"></div>'
    + '<div class="foot"><div class="said" role="alert"></div><div class="strip" aria-live="polite"></div><div class="buttons"></div></div>'
    + '<details><summary>Everybody</summary><div class="figures"></div></details>';
  find('.who').textContent = page.annotator;
  find('.asked').textContent = page.asked || '';
  find('.progress').textContent = page.progress;
  find('.track div').style.width = `${100 * page.done / Math.max(1, page.done + page.left)}%`;
  find('.figures').innerHTML = page.figures;
  const buttons = find('.buttons');
  if (page.task) {
    find('.work').innerHTML = `<div class="prompt" tabindex="0">${page.prompt}</div><div class="cards">${page.cards}</div>`;
    const rows = page.longest > 1500 ? page.num : Math.ceil(page.num / (page.num === 4 ? 2 : 3));  // long texts: two columns at most
    find('.cards').style.setProperty('--columns', Math.max(Math.min(2, page.num), Math.ceil(page.num / rows)));
    buttons.innerHTML = '<button class="main" data-do="submit">Submit<kbd>Enter</kbd></button><button data-do="tie">Tie the next<kbd>=</kbd></button>'
      + '<button data-do="rest">Tie the rest<kbd>R</kbd></button><button data-do="back">Take back<kbd>⌫</kbd></button>'
      + '<textarea class="comment" placeholder="Comment (C)" maxlength="10000" aria-label="Comment"></textarea>'
      + '<button data-do="skip">Skip<kbd>S</kbd></button>';
    find('.comment').value = page.comment || '';
  } else {
    find('.work').innerHTML = '<p><strong>All done, thank you.</strong> Nothing is left for you.</p>';
  }
  buttons.insertAdjacentHTML('beforeend', '<button data-do="undo">Undo<kbd>U</kbd></button>'
    + (page.task && page.task.replace ? '<button data-do="keep">Keep it as it was</button>' : '')
    + '<div class="skipping"><input class="why" maxlength="1000" placeholder="Why? I cannot judge this because …" aria-label="Why skip">'
    + '<button data-do="skipnow">Skip it<kbd>Enter</kbd></button><button data-do="stay">Back<kbd>Esc</kbd></button></div>');
  say(page.message || page.before, !!page.message);
  paint();
  window.scrollTo(0, 0);
}

function ordinal(n) {
  const last = n % 100 >= 11 && n % 100 <= 13 ? 0 : n % 10;
  return n + (['th', 'st', 'nd', 'rd'][last] || 'th');
}

function paint() {
  const strip = find('.strip');
  if (!strip) return;
  for (const button of root.querySelectorAll('button')) button.disabled = busy;
  const undo = find('[data-do=undo]');
  undo.disabled = busy || !page.undo;
  strip.replaceChildren();
  if (!page.task) return;
  const places = {};
  let place = 1;
  for (const group of groups) {
    for (const position of group) places[position] = ordinal(place) + (group.length > 1 ? ', tied' : '');
    place += group.length;
  }
  for (const card of root.querySelectorAll('.card')) {
    const at = places[card.dataset.position];
    card.classList.toggle('chosen', !!at);
    card.querySelector('.place').textContent = at || 'choose';
  }
  const gap = (index, text) => {
    const zone = make('span', 'gap', text);
    zone.dataset.gap = index;
    return zone;
  };
  strip.append(make('span', 'end', 'best'));
  groups.forEach((group, index) => {
    strip.append(gap(index, index ? '>' : ''));
    const box = make('span', 'group');
    box.dataset.group = index;
    group.forEach((position, i) => {
      if (i) box.append('=');
      const chip = make('button', 'chip', position + 1);
      chip.type = 'button';
      chip.draggable = true;
      chip.dataset.position = position;
      chip.title = 'drag to another place, or onto another to tie; click to take out';
      box.append(chip);
    });
    strip.append(box);
  });
  const left = page.num - ranked().length;
  strip.append(gap(groups.length, groups.length && left ? (tie ? '=' : '>') : ''),
    make('span', 'end', left ? `… ${left} to place` : 'worst'));
  find('[data-do=submit]').disabled = busy || left > 0;
  find('[data-do=tie]').disabled = busy || !groups.length || !left;
  find('[data-do=tie]').classList.toggle('on', tie);
  find('[data-do=rest]').disabled = busy || !left;
  find('[data-do=back]').disabled = busy || !groups.length;
}

function remove(position) {
  groups = groups.map((group) => group.filter((p) => p !== position)).filter((group) => group.length);
}

function pick(position) {
  if (busy || position >= page.num) return;
  if (ranked().includes(position)) remove(position);
  else if (tie && groups.length) groups[groups.length - 1].push(position);
  else groups.push([position]);
  tie = false;
  say('');
  paint();
}

function drop(position, zone) {
  // The zone is looked up before the moved one is taken out, because that shifts what follows.
  const target = zone.dataset.group !== undefined ? groups[zone.dataset.group] : null;
  const next = target ? null : groups.slice(Number(zone.dataset.gap)).find((g) => g.some((p) => p !== position));
  groups = groups.map((g) => { const i = g.indexOf(position); if (i >= 0) g.splice(i, 1); return g; });
  if (target) target.push(position);
  else groups.splice(next ? groups.indexOf(next) : groups.length, 0, [position]);
  groups = groups.filter((g) => g.length);
  tie = false;
  paint();
}

const deeds = {
  submit() {
    if (ranked().length < page.num) say('Every response needs a place first.', true);
    else ask({do: 'submit', ...page.task, groups, comment: find('.comment').value});
  },
  tie() { if (groups.length && ranked().length < page.num) { tie = !tie; paint(); } },
  rest() {
    const left = [...Array(page.num).keys()].filter((p) => !ranked().includes(p));
    if (left.length) { if (tie && groups.length) groups[groups.length - 1].push(...left); else groups.push(left); }
    tie = false;
    paint();
  },
  back() {
    if (groups.length) { groups[groups.length - 1].pop(); groups = groups.filter((g) => g.length); }
    tie = false;
    paint();
  },
  skip() { find('.skipping').classList.add('on'); find('.why').focus(); },
  stay() { find('.skipping').classList.remove('on'); document.activeElement.blur(); },
  skipnow() { ask({do: 'submit', ...page.task, skip: find('.why').value, comment: find('.comment').value}); },
  undo() { if (page.undo) ask({do: 'undo'}); },
  keep() { ask({do: 'keep'}); },
};

root.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button && button.dataset.do) deeds[button.dataset.do]();
  else if (button && button.dataset.position !== undefined) pick(Number(button.dataset.position));
  else if (!button) {
    const card = event.target.closest('.card');
    if (card && String(window.getSelection()) === '') pick(Number(card.dataset.position));  // marking text is not choosing
  }
  if (button && event.detail > 0 && document.activeElement === button) button.blur();  // Enter after a click submits
});

root.addEventListener('dragstart', (event) => {
  const dragged = event.target.closest && event.target.closest('[data-position][draggable=true]');
  if (!dragged) return;
  event.dataTransfer.setData('text/plain', dragged.dataset.position);
  root.classList.add('dragging');
});
root.addEventListener('dragend', () => root.classList.remove('dragging'));
const zoneOf = (event) => event.target.closest && event.target.closest('.gap, .group');
root.addEventListener('dragover', (event) => {
  root.querySelectorAll('.over').forEach((zone) => zone.classList.remove('over'));
  if (zoneOf(event)) { event.preventDefault(); zoneOf(event).classList.add('over'); }
});
root.addEventListener('drop', (event) => {
  const zone = zoneOf(event), position = Number.parseInt(event.dataTransfer.getData('text/plain'), 10);
  if (!zone || !(position >= 0 && position < page.num)) return;
  event.preventDefault();
  drop(position, zone);
});

document.addEventListener('keydown', (event) => {
  if (!page || busy || event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const target = event.target;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) || target.isContentEditable) {
    if (event.key === 'Escape') deeds.stay();
    if (event.key === 'Enter' && target.classList.contains('why')) { event.preventDefault(); deeds.skipnow(); }
    return;
  }
  const key = event.key.toLowerCase();
  if ((key === 'enter' || key === ' ') && target.tagName === 'BUTTON') return;  // the button's own
  if (key === 'u') deeds.undo();
  else if (!page.task) return;
  else if (/^[0-9]$/.test(key)) pick(key === '0' ? 9 : Number(key) - 1);
  else if (key === '=' || key === 't') deeds.tie();
  else if (key === 'r') deeds.rest();
  else if (key === 'backspace') deeds.back();
  else if (key === 'enter') { if (!event.repeat) deeds.submit(); }
  else if (key === 's') deeds.skip();
  else if (key === 'c') find('.comment').focus();
  else return;
  event.preventDefault();
});

if (annotator) ask({do: 'start'}); else welcome();
