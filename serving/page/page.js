// The page's one module. Text of catalogues, users and models is hostile: it only ever goes in by textContent.

const SHOWN = 12; // recommendations
const REASON_TOKENS = 40;
const $ = (id) => document.getElementById(id);
const state = {
  key: "",
  user: null, // id of a user whose history the server keeps, or null
  history: [], // items, oldest first, as GET /v1/items gives them
  list: new AbortController(), // ends what belongs to the list that is shown
  chat: null, // the AbortController of a running answer
  messages: [],
};

// -- the server ------------------------------------------------------------------------------------------------

async function ask(path, { body, signal } = {}) {
  const headers = state.key ? { authorization: `Bearer ${state.key}` } : {};
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(path, {
    method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
  });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  const again = answer.headers.get("retry-after");
  const text = problem.error?.message ?? problem.error ?? answer.statusText;
  const error = new Error(`${text}${again ? ` (try again in ${again} s)` : ""}`);
  error.status = answer.status;
  throw error;
}

const get = async (path, options) => (await ask(path, options)).json();
const post = async (path, body, signal) => (await ask(path, { body, signal })).json();

function say(id, text, bad = false) {
  $(id).textContent = text;
  $(id).classList.toggle("bad", bad);
}

// Runs a step and says what went wrong where the reader looks.
const guarded = (id, step) => async (event) => {
  event?.preventDefault();
  try {
    await step(event);
  } catch (error) {
    if (error.name !== "AbortError") say(id, error.message, true);
  }
};

// -- items -----------------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Does something once when an element comes into view.
const waiting = new WeakMap();
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    waiting.get(target)?.();
    waiting.delete(target);
  }
}, { rootMargin: "100px" });

function whenSeen(target, action) {
  waiting.set(target, action);
  watcher.observe(target);
}

function picture(item) {
  const frame = element("div", { className: "picture", ariaHidden: "true", textContent: item.title.slice(0, 1) });
  if (item.image) {
    whenSeen(frame, async () => {
      try {
        const url = URL.createObjectURL(await (await ask(item.image)).blob()); // an <img> could not send the key
        const shown = element("img", { alt: "", src: url });
        await shown.decode();
        URL.revokeObjectURL(url);
        frame.replaceChildren(shown);
      } catch { /* the letter stays */ }
    });
  }
  return frame;
}

function card(item, ...more) {
  const price = item.price == null ? [] : [item.price.toFixed(2)];
  const facts = [...(item.categories ?? []), ...price].join(" · ");
  return element("li", { className: "item" },
    picture(item),
    element("div", { className: "title", textContent: item.title || item.item_id }),
    element("div", { className: "facts", textContent: facts }),
    ...more);
}

function action(label, item, run) {
  const button = element("button", { type: "button", textContent: label, onclick: run });
  button.setAttribute("aria-label", `${label}: ${item.title || item.item_id}`);
  return button;
}

async function details(ids) {
  if (!ids.length) return [];
  const query = new URLSearchParams(ids.map((id) => ["item_id", id]));
  return (await get(`/v1/items?${query}`)).items;
}

// -- user and history ------------------------------------------------------------------------------------------

const showUser = guarded("user-hint", async () => {
  const name = $("user-id").value.trim();
  const { items } = name ? await get(`/v1/users/${encodeURIComponent(name)}/history`) : { items: [] };
  state.user = name || null;
  state.history = items;
  const kept = items.length ? `${items.length} stored events.` : "A new user: add items below.";
  say("user-hint", state.user ? kept : "Nobody in particular: what you add stays on this page.");
  newChat();
  drawHistory();
  await recommend();
});

function drawHistory() {
  const remove = (place) => () => {
    state.history.splice(place, 1);
    drawHistory();
    recommend();
  };
  const cards = state.history.map((item, place) =>
    state.user ? card(item) : card(item, action("Remove", item, remove(place))));
  $("history").replaceChildren(...cards.reverse());
  $("history-title").textContent = state.history.length ? "History, newest first" : "History: nothing yet";
}

const add = (item) => guarded("user-hint", async () => {
  if (state.user) await post("/v1/events", { events: [{ user_id: state.user, item_id: item.item_id }] });
  state.history.push(item);
  drawHistory();
  await recommend();
});

const search = guarded("search-status", async () => {
  const { items } = await get(`/v1/items?${new URLSearchParams({ query: $("search").value, limit: 20 })}`);
  say("search-status", items.length ? `${items.length} items, the most popular first.` : "No item has these words.");
  $("found").replaceChildren(...items.map((item) => card(item, action("Add", item, add(item)))));
});

// -- recommendations -------------------------------------------------------------------------------------------

const whose = () => state.user ? { user_id: state.user } : { history: state.history.map((item) => item.item_id) };

function filters() {
  const number = (id) => $(id).value === "" ? null : Number($(id).value);
  const wanted = { price_min: number("price-min"), price_max: number("price-max") };
  if ($("category").value) wanted.categories = [$("category").value];
  return wanted;
}

const recommend = guarded("list-status", async () => {
  state.list.abort();
  state.list = new AbortController();
  const { signal } = state.list;
  if (!$("filter-form").reportValidity()) return;
  say("list-status", "Asking …");
  const answer = await post("/v1/recommend", { ...whose(), ...filters(), k: SHOWN }, signal);
  const items = await details(answer.items.map((item) => item.item_id));
  if (signal.aborted) return;
  const popular = `The most popular items, because the model gave no list in time (${answer.reason}).`;
  const count = items.length ? `${items.length} items, best first.` : "No item passes these filters; relax one.";
  say("list-status", answer.fallback ? popular : count, answer.fallback);
  let turn = Promise.resolve(); // one text at a time: lists must not wait behind many
  const cards = items.map((item) => {
    const reason = element("div", { className: "reason" });
    const made = card(item, reason, action("Had it", item, add(item)));
    if ($("reasons").checked) {
      whenSeen(reason.parentElement, () => { turn = turn.then(() => explain(item, reason, signal)); });
    }
    return made;
  });
  $("recommended").replaceChildren(...cards);
});

async function explain(item, place, signal) {
  if (signal.aborted) return;
  place.textContent = "…";
  try {
    const wish = { ...whose(), item_id: item.item_id, task: "explain", max_tokens: REASON_TOKENS };
    place.textContent = (await post("/v1/describe", wish, signal)).text;
  } catch (error) {
    place.textContent = error.name === "AbortError" ? "" : `No reason: ${error.message}`;
  }
}

// -- chat ------------------------------------------------------------------------------------------------------

function newChat() {
  state.chat?.abort();
  state.messages = [];
  $("log").replaceChildren();
  say("chat-status", "");
}

function bubble(role, text) {
  const words = element("span", { textContent: text });
  const who = element("span", { className: "who", textContent: role === "user" ? "You" : "genrec" });
  $("log").append(element("div", { className: role }, who, words));
  words.scrollIntoView({ block: "nearest" });
  return words;
}

// The JSON chunks of a stream of server-sent events.
async function* chunks(answer) {
  let rest = "";
  for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + piece).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function attach(words, items) {
  const shown = items.map(({ id, title, image, reason }) => {
    const item = { item_id: id, title, image };
    return card(item, element("div", { className: "reason", textContent: reason ?? "" }), action("Had it", item, add(item)));
  });
  words.parentElement.append(element("ul", { className: "strip" }, ...shown));
}

const send = guarded("chat-status", async () => {
  const text = $("message").value.trim();
  if (!text || state.chat) return;
  const question = { role: "user", content: text };
  bubble("user", text);
  $("message").value = "";
  say("chat-status", "Writing …");
  state.chat = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("log").ariaBusy = "true"; // read the answer out when it is whole
  const body = { model: "genrec", messages: [...state.messages, question], stream: true };
  if (state.user) body.user = state.user;
  try {
    const answer = await ask("/v1/chat/completions", { body, signal: state.chat.signal });
    const words = bubble("assistant", "");
    for await (const chunk of chunks(answer)) {
      if (chunk.error) throw new Error(chunk.error.message ?? chunk.error);
      words.textContent += chunk.choices?.[0]?.delta?.content ?? "";
      if (chunk.genrec?.items?.length) attach(words, chunk.genrec.items);
      $("log").scrollTop = $("log").scrollHeight;
    }
    state.messages.push(question, { role: "assistant", content: words.textContent });
    say("chat-status", "");
  } catch (error) {
    if (error.name === "AbortError") say("chat-status", "Stopped.");
    else if (error.status === 404) say("chat-status", "This server has no chat: it knows no /v1/chat/completions.", true);
    else throw error;
  } finally {
    state.chat = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("log").ariaBusy = "false";
    $("message").focus();
  }
});

// -- start -----------------------------------------------------------------------------------------------------

const start = guarded("server", async () => {
  const health = await get("/healthz");
  say("server", `${health.items} items · engine ${health.engine} · export ${health.export}`);
  $("reasons").checked = health.tasks.includes("explain"); // a model that was not trained to write writes nonsense
  try {
    const { categories } = await get("/v1/categories");
    $("category").replaceChildren(element("option", { value: "", textContent: "all" }), ...categories.map(
      ({ name, items }) => element("option", { value: name, textContent: `${name} (${items})` })));
  } catch (error) {
    if (error.status !== 401) throw error;
    $("access").open = true;
    $("key").focus();
    say("list-status", "This server asks for an API key: see the top of the page.", true);
    return;
  }
  try {
    const { users } = await get("/v1/users");
    $("users").replaceChildren(...users.map((name) => element("option", { value: name })));
  } catch (error) {
    $("user-id").disabled = true;
    say("user-hint", `No stored users: ${error.message}`);
    drawHistory();
    await recommend();
    return;
  }
  await showUser();
});

$("key-form").addEventListener("submit", guarded("server", async () => {
  state.key = $("key").value.trim();
  await start();
}));
$("user-form").addEventListener("submit", showUser);
$("search-form").addEventListener("submit", search);
$("filter-form").addEventListener("submit", recommend);
$("filter-form").addEventListener("change", recommend);
$("chat-form").addEventListener("submit", send);
$("stop").addEventListener("click", () => state.chat?.abort());
$("clear").addEventListener("click", newChat);
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
start();
