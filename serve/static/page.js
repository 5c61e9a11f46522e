"use strict";

const MOST_TEXTS = 32;
const NEAREST_PAIRS = 5;
const element = (id) => document.getElementById(id);

function headers() {
  const key = element("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body) {
  const options = body ? { method: "POST", headers: headers(), body: JSON.stringify(body) } : { headers: headers() };
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error ? answer.error.message : response.statusText);
  return answer;
}

function make(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// Cosines of some models all lie close together: colours span what is there, the numbers say what it is.
function colour(value, low, high) {
  const share = high > low ? (value - low) / (high - low) : 1;
  return { background: `hsl(${215 - 15 * share} 70% ${96 - 56 * share}%)`, ink: share > 0.6 ? "#fff" : "#111" };
}

function heatMap(texts, cosines, model) {
  const others = cosines.flatMap((row, i) => row.filter((_, j) => i !== j));
  const [low, high] = [Math.min(...others, 1), Math.max(...others, -1)];
  const table = make("table", undefined, { "aria-label": `Cosines by ${model}` });
  const head = table.createTHead().insertRow();
  head.append(make("th", ""), ...texts.map((text, j) => make("th", String(j + 1), { scope: "col", title: text })));
  const body = table.createTBody();
  cosines.forEach((row, i) => {
    const line = body.insertRow();
    line.append(make("th", `${i + 1}  ${texts[i]}`, { scope: "row", title: texts[i], dir: "auto" }));
    row.forEach((cosine, j) => {
      const cell = line.insertCell();
      const { background, ink } = colour(Math.min(cosine, high), low, high);
      cell.textContent = cosine.toFixed(2);
      cell.title = `${texts[i]} — ${texts[j]}`;
      cell.style.background = background;
      cell.style.color = ink;
    });
  });
  return table;
}

function nearest(texts, cosines) {
  const pairs = [];
  for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) pairs.push([cosines[i][j], j, i]);
  pairs.sort((a, b) => b[0] - a[0]);
  const list = make("ol");
  for (const [cosine, i, j] of pairs.slice(0, NEAREST_PAIRS)) {
    list.append(make("li", `${cosine.toFixed(3)}  ${texts[i]} — ${texts[j]}`, { dir: "auto" }));
  }
  return list;
}

function card(model, texts, answer, milliseconds) {
  const article = make("article", undefined, { "data-model": model.id });
  const facts = [`${milliseconds.toFixed(0)} ms here, ${(1000 * answer.seconds).toFixed(0)} ms at the model`,
    `${answer.usage.prompt_tokens} tokens`];
  if (model.num_parameters) facts.push(`${(model.num_parameters / 1e6).toFixed(1)} M parameters`);
  const map = make("div", undefined, { class: "map" });
  map.append(heatMap(texts, answer.data, model.id));
  article.append(make("h2", model.id), make("p", facts.join(" · ")), map);
  if (texts.length > 1) article.append(make("h3", "Nearest pairs"), nearest(texts, answer.data));
  return article;
}

async function compare(event) {
  event.preventDefault();
  const texts = element("texts").value.split("\n").map((text) => text.trim()).filter(Boolean);
  const status = element("status");
  status.className = "";
  try {
    if (!texts.length) throw new Error("Type at least one sentence.");
    if (texts.length > MOST_TEXTS) throw new Error(`${texts.length} sentences; this page takes ${MOST_TEXTS}.`);
    status.textContent = "…";
    const models = (await ask("v1/models")).data;
    const cards = [];
    for (const model of models) { // one after the other: each model's latency is its own
      const body = { model: model.id, input: texts };
      if (element("type").value) body.input_type = element("type").value;
      const begun = performance.now();
      const answer = await ask("v1/similarity", body);
      cards.push(card(model, texts, answer, performance.now() - begun));
    }
    element("models").replaceChildren(...cards);
    showCode(models[models.length - 1].id);
    status.textContent = `${texts.length} sentences, ${models.length} models.`;
  } catch (error) {
    status.className = "error";
    status.textContent = error.message;
  }
}

const CLIENTS = {
  "openai-python": (base, model) => `from openai import OpenAI

client = OpenAI(base_url="${base}v1", api_key="YOUR KEY")
answer = client.embeddings.create(
    model="${model}",
    input=["How do I repair a window?"],
    extra_body={"input_type": "query"},
)
vector = answer.data[0].embedding`,
  curl: (base, model) => `curl ${base}v1/embeddings \\
  -H 'Authorization: Bearer YOUR KEY' -H 'Content-Type: application/json' \\
  -d '{"model": "${model}", "input": ["How do I repair a window?"], "input_type": "query"}'`,
  LangChain: (base, model) => `from langchain_openai import OpenAIEmbeddings

embeddings = OpenAIEmbeddings(
    base_url="${base}v1",
    api_key="YOUR KEY",
    model="${model}",
    check_embedding_ctx_length=False,  # otherwise it sends another tokenizer's ids
)
vectors = embeddings.embed_documents(["How do I repair a window?"])`,
};
let client = "openai-python";
let shownModel = "full";

function showCode(model) {
  shownModel = model;
  const base = location.href.split(/[?#]/)[0];
  element("code").textContent = CLIENTS[client](base.endsWith("/") ? base : `${base}/`, model);
  for (const tab of element("languages").children) tab.setAttribute("aria-selected", String(tab.textContent === client));
}

for (const name of Object.keys(CLIENTS)) {
  const tab = make("button", name, { type: "button", role: "tab" });
  tab.addEventListener("click", () => { client = name; showCode(shownModel); });
  element("languages").append(tab);
}
element("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(element("code").textContent);
  element("copy").textContent = "Copied";
});
element("form").addEventListener("submit", compare);
showCode(shownModel);
