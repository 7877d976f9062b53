"use strict";
// The prefix tree: from left to right as prompts go on, a line for each end, what they share drawn once.

const ROW = 25, HEIGHT = 19, MIN_WIDTH = 34, GAP = 3;  // pixels
const MAX_ROWS = 24;

// Give each branch a place: {branch, children, x, width, row}. Returns the branches in order, and the number of rows.
function layOut(branches, width) {
  const nodes = branches.map(branch => ({branch, children: []}));
  const roots = [];
  nodes.forEach(node => (node.branch.parent < 0 ? roots : nodes[node.branch.parent].children).push(node));
  const depth = node => 1 + Math.max(0, ...node.children.map(depth));
  const reach = node => node.branch.num_tokens + Math.max(0, ...node.children.map(reach));
  const levels = Math.max(1, ...roots.map(depth)), longest = Math.max(1, ...roots.map(reach));
  const scale = Math.max(0, width - levels * (MIN_WIDTH + GAP)) / longest;
  let row = 0;
  const place = (node, x) => {
    node.x = x;
    node.row = row;
    node.width = MIN_WIDTH + scale * node.branch.num_tokens;
    node.children.forEach((child, i) => {
      if (i) row++;
      place(child, x + node.width + GAP);
    });
    node.lastRow = node.children.at(-1)?.row ?? node.row;
  };
  for (const root of roots) {
    place(root, 0);
    row++;
  }
  return {nodes: nodes.filter(node => node.row < MAX_ROWS), numRows: Math.min(row, MAX_ROWS)};
}

function describeBranch({num_tokens: tokens, start, hits, num_users: users, num_hidden: hidden, rids, replica}, numReplicas) {
  const parts = [`${count(tokens)} tokens${start ? ` behind ${count(start)}` : ""}`, `found ${times(hits)}`, users ? `held by ${count(users)}` : "held by nobody"];
  if (hidden) parts.push(`${count(hidden)} more branches`);
  if (numReplicas > 1) parts.push(`replica ${replica}`);
  return parts.join(" · ") + (rids.length ? ` (${rids.join(", ")})` : "");
}

function drawTree(branches, numReplicas) {
  const tree = at("tree");
  const state = JSON.stringify([branches, tree.clientWidth]);
  if (state === drawTree.state) return;
  tree.hidden = !branches.length;
  at("no-tree").hidden = branches.length > 0;
  const {nodes, numRows} = layOut(branches, tree.clientWidth);
  drawTree.state = JSON.stringify([branches, tree.clientWidth]);
  const focused = document.activeElement?.dataset?.branch;
  const most = Math.max(1, ...branches.map(branch => branch.hits));
  tree.style.height = `${numRows * ROW}px`;
  tree.replaceChildren(...nodes.flatMap(({branch, x, width, row, lastRow}, i) => {
    const text = describeBranch(branch, numReplicas);
    const node = element("button", {type: "button", role: "treeitem", class: `branch ${branch.num_users ? "held" : ""} ${branch.hits > most / 4 ? "hot" : ""}`, "data-branch": i, text: branch.head.replaceAll("\n", "⏎"), "aria-label": `${branch.head.slice(0, 40)}: ${text}`});
    Object.assign(node.style, {left: `${x}px`, top: `${row * ROW}px`, width: `${width}px`});
    for (const name of ["pointerenter", "focus"]) node.addEventListener(name, () => { set("tree-detail", `${text}: ${branch.head}`); });
    if (lastRow === row) return [node];
    const fork = element("div", {class: "fork"});
    Object.assign(fork.style, {left: `${x + width + 1}px`, top: `${row * ROW + HEIGHT / 2}px`, height: `${(Math.min(lastRow, MAX_ROWS - 1) - row) * ROW}px`});
    return [node, fork];
  }));
  if (focused !== undefined) tree.querySelector(`[data-branch="${focused}"]`)?.focus();
  const hidden = branches.reduce((sum, branch) => sum + branch.num_hidden, 0);
  set("tree-note", branches.length ? `blue: in use · orange line: found often${hidden ? ` · ${count(hidden)} more branches` : ""}` : "");
}
