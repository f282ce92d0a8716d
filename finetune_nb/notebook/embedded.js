// The trajectory browser in a page of its own: what a kernel would answer is answered from the data beside it. It comes after
// browser.js.

/** Records with their columns, as `_compressed` of embedded.py writes them: [[about, [DataView, ...]], ...]. */
async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  let at = 4 + length;
  return JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length))).map(([about, sizes]) => [
    about,
    sizes.map((size) => new DataView(buffer, (at += size) - size, size)),
  ]);
}

/** Which rollouts of an epoch a filter lets through; as `matching` of analysis/browse_index.py.
 * hits, labelled: for each rollout whether it has the text and the label; null: not looked for. */
export function matching(index, signals, filter, hits, labelled) {
  const found = new Uint8Array(index.rollouts);
  const between = (value, [low, high]) => !Number.isNaN(value) && (low === null || value >= Math.fround(low)) && (high === null || value <= Math.fround(high));
  for (let i = 0; i < found.length; i++) {
    const failed = (index.flags[i] & FAILED) !== 0;
    found[i] =
      (filter.signal === undefined || signals[index.signals[groupOf(index, i)]].name === filter.signal) &&
      (filter.failed === undefined || failed === filter.failed) &&
      (filter.cut === undefined || ((index.flags[i] & CUT) !== 0) === filter.cut) &&
      (filter.missing === undefined || (Number.isNaN(index.rewards[i]) && !failed) === filter.missing) &&
      (filter.reward === undefined || between(index.rewards[i], filter.reward)) &&
      (filter.turns === undefined || (between(index.turns[i], filter.turns) && !failed)) &&
      (!hits || hits[i]) && (!labelled || labelled[i]) ? 1 : 0;
  }
  return found;
}

/** What groups are sorted by the largest of, for a rollout; null for an order by something of the group itself. */
function sortedBy(index, sort, least) {
  if (sort === "length") return (i) => index.tokens[i];
  if (sort === "advantage") return (i) => Math.abs(index.advantages[i]);
  return least[sort] ? (i) => -least[sort][i] : null;
}

/** The groups to list, in order; as `group_order` of analysis/browse_index.py. least: by order, of each rollout the logprob of its
 * least likely token. */
export function groupOrder(index, found, sort, least) {
  const listed = [];
  for (let group = 0; group < index.groups; group++) {
    if (found.subarray(index.starts[group], index.starts[group + 1]).includes(1)) listed.push(group);
  }
  if (sort === "recorded") return Uint32Array.from(listed);
  const value = sortedBy(index, sort, least);
  const largest = (group) => {
    let most = NaN;
    for (let i = index.starts[group]; i < index.starts[group + 1]; i++) {
      if (found[i] && !Number.isNaN(value(i)) && !(value(i) <= most)) most = value(i);
    }
    return -most;
  };
  const key = {
    mean: (group) => index.means[group],
    spread: (group) => -index.spreads[group],
    change: (group) => -Math.abs(Math.fround(index.means[group] - index.before[group])),
  }[sort] ?? largest;
  const keys = new Map(listed.map((group) => [group, Number.isNaN(key(group)) ? Infinity : key(group)]));
  listed.sort((a, b) => (keys.get(a) < keys.get(b) ? -1 : keys.get(a) > keys.get(b) ? 1 : a - b));
  return Uint32Array.from(listed);
}

/** Of each group in an order the rollout to open first; as `leading` of analysis/browse_index.py. */
export function leading(index, found, sort, least, order) {
  const value = sortedBy(index, sort, least) ?? (() => 0);
  const key = (i) => (Number.isNaN(value(i)) ? -Infinity : value(i));
  return order.map((group) => {
    let first = -1;
    for (let i = index.starts[group]; i < index.starts[group + 1]; i++) {
      if (found[i] && (first < 0 || key(i) > key(first))) first = i;
    }
    return first;
  });
}

/** What anywidget calls a model, with its answers in the page. */
class PageModel {
  constructor(data) {
    Object.assign(this, { data, heard: [], searches: 0, indexes: new Map(), groups: new Cache(24e6), hits: new Map() });
  }

  get(name) {
    return name === "sheet" ? this.data.sheet : "";
  }

  on(name, call) {
    if (name === "msg:custom") this.heard.push(call);
  }

  off(name, call) {
    this.heard = this.heard.filter((each) => each !== call);
  }

  async send({ id, op, ...asked }) {
    let answer, buffers;
    try {
      if (!Object.hasOwn(PageModel.answers, op)) throw new Error("this needs a kernel: open the run in a notebook");
      [answer, buffers] = await PageModel.answers[op](this, asked);
    } catch (error) {
      answer = { problem: error.message };
    }
    this.tell({ id, ...answer }, buffers ?? []);
  }

  tell(content, buffers = []) {
    for (const call of this.heard) call(content, buffers);
  }

  /** {about, buffers, index, least} of an epoch. */
  async epoch(number) {
    let found = this.indexes.get(number);
    if (!found) {
      const [[about, buffers]] = await inflated(this.data.epochs[number].index);
      const [unlikely, call] = buffers.slice(-2).map((buffer) => column(Float32Array, buffer));
      found = { about, buffers, index: readIndex(about, buffers), least: { unlikely, call } };
      this.indexes.set(number, found);
    }
    return found;
  }

  /** What the rollouts of a group say, [[about, buffers], ...]; null where that is not in the page. */
  async group(number, group) {
    const text = this.data.epochs[number].bodies[group];
    if (!text) return null;
    const key = `${number}/${group}`;
    const known = this.groups.get(key);
    if (known) return known;
    const found = await inflated(text);
    this.groups.put(key, found, text.length * 3);
    return found;
  }

  async body(number, rollout) {
    const { index } = await this.epoch(number);
    const group = groupOf(index, rollout);
    const found = await this.group(number, group);
    if (!found) throw new Error(`what this rollout says is not in this page; run.show(${JSON.stringify(nameOf(index, rollout))}) shows it`);
    return { index, found: found[rollout - index.starts[group]] };
  }

  /** For each rollout of an epoch, whether it has the text, in upper or lower case. */
  async rolloutsWith(number, text) {
    const key = `${number} ${text}`;
    if (this.hits.has(key)) return this.hits.get(key);
    const { index } = await this.epoch(number);
    const wanted = text.toLowerCase();
    const hits = new Uint8Array(index.rollouts);
    for (const group of Object.keys(this.data.epochs[number].bodies)) {
      (await this.group(number, group)).forEach((found, i) => {
        hits[index.starts[group] + i] = textsOf(readBody(...found)).some((each) => each?.toLowerCase().includes(wanted)) ? 1 : 0;
      });
    }
    if (this.hits.size > 200) this.hits.clear();
    this.hits.set(key, hits);
    return hits;
  }

  /** For each rollout of an epoch, whether it or its group has the label; "*": any. */
  labelled(number, index, wanted) {
    const found = new Uint8Array(index.rollouts);
    for (const [level, place, tag] of this.data.epochs[number].labels.labels) {
      if (wanted !== "*" && wanted !== tag) continue;
      if (level === "rollout") found[place] = 1;
      if (level === "group") found.fill(1, index.starts[place], index.starts[place + 1]);
    }
    return found;
  }

  /** Nearest epochs first; each is told when it has been looked through. Another search ends it. */
  async search(text, near) {
    const number = ++this.searches;
    const epochs = this.data.hello.epochs.map(([epoch]) => epoch).sort((a, b) => Math.abs(a - near) - Math.abs(b - near));
    for (const epoch of text ? epochs : []) {
      const hits = await this.rolloutsWith(epoch, text);
      if (number !== this.searches) return;
      this.tell({ event: "hits", text, epoch, rollouts: hits.reduce((sum, hit) => sum + hit, 0) });
    }
    if (text) this.tell({ event: "hits", text, done: true });
  }

  static answers = {
    hello: async ({ data }) => [data.hello],
    news: async () => [{}],
    at: async () => [{}],
    index: async (model, { epoch }) => {
      const { about, buffers } = await model.epoch(epoch);
      return [about, buffers];
    },
    view: async (model, { epoch, filter, sort }) => {
      const { index, least } = await model.epoch(epoch);
      const hits = filter.text ? await model.rolloutsWith(epoch, filter.text) : null;
      const labelled = filter.label ? model.labelled(epoch, index, filter.label) : null;
      const found = matching(index, model.data.hello.signals, filter, hits, labelled);
      const order = groupOrder(index, found, sort, least);
      const first = leading(index, found, sort, least, order);
      const rollouts = found.reduce((sum, each) => sum + each, 0);
      return [{ rollouts, version: null }, [order, found, first].map((each) => new DataView(each.buffer))];
    },
    body: async (model, { epoch, rollout }) => (await model.body(epoch, rollout)).found,
    raw: async (model, { epoch, rollout }) => {
      const { index, found } = await model.body(epoch, rollout);
      const body = readBody(...found);
      const messages = body.turns.map(({ role, name, calls, thought, start, stop }, i) => ({
        role, name, content: body.texts.at(i), calls, thought, logprobs: [...body.logprobs.subarray(start, stop)],
      }));
      const { scores, words: reasonings, output, error, version } = body;
      const reward = Number.isNaN(index.rewards[rollout]) ? null : index.rewards[rollout];
      return [{ text: JSON.stringify({ name: nameOf(index, rollout), reward, scores, reasonings, version, error, messages, output }, null, 2) }];
    },
    python: async (model, { epoch, rollout }) => [{ text: `run.show(${JSON.stringify(nameOf((await model.epoch(epoch)).index, rollout))})` }],
    history: async (model, { epoch, groups }) => {
      const { index } = await model.epoch(epoch);
      const examples = groups.map((group) => index.examples.at(group));
      const means = examples.map(() => []);
      for (const [number] of model.data.hello.epochs.filter(([number]) => number <= epoch).slice(-64)) {
        const { about, index: other } = await model.epoch(number);
        about.groups ??= new Map(Array.from({ length: other.groups }, (_, group) => [other.examples.at(group), group]));
        examples.forEach((example, i) => {
          const mean = about.groups.has(example) ? other.means[about.groups.get(example)] : NaN;
          means[i].push(Number.isFinite(mean) ? mean : null);
        });
      }
      return [{ groups, means }];
    },
    labels: async (model, { epoch }) => [model.data.epochs[epoch].labels],
    search: async (model, { text, epoch }) => {
      model.search(text, epoch);
      return [{}];
    },
  };
}

const nameOf = (index, rollout) => `e${index.epoch}/${index.examples.at(groupOf(index, rollout))}/${generationText(index, rollout)}`;

/** What a search looks through: messages, tool calls, thinking, the error. */
function textsOf(body) {
  const calls = body.turns.flatMap((turn) => turn.calls.flatMap((call) => [call.name, call.arguments]));
  return [...body.turns.map((turn, i) => body.texts.at(i)), ...body.turns.map((turn) => turn.thought), ...calls, body.error];
}

const held = document.getElementById("ft-rollouts");
if (held && typeof DecompressionStream !== "undefined") {
  const el = document.createElement("div");
  el.className = "ft-rollouts";
  for (const still of held.children) still.hidden = true;
  held.append(el);
  show(new PageModel(JSON.parse(document.getElementById("ft-rollouts-data").textContent)), el);
}
