#!/usr/bin/env python3
"""Turns CUDA C++ into C++ that dev/emu/include compiles.

    rewrite.py OUT_DIR SOURCE.cu        (run from the root of the repository)

Writes SOURCE.cu and every .cu, .cuh and .h that it includes by a path from the root into OUT_DIR, under the
same names. Two things of the language are rewritten, everything else is done by headers:

    k<A><<<grid, block, shared, stream>>>(x);   ->   emu_launch("k<A>", k<A>, grid, block, shared, stream)(x);
    __shared__ float tile[N], sum;              ->   references into the block's shared memory

Lines stay where they were, and #line names the original file: messages, __FILE__ and gdb show what you wrote.
Prints the files it read, one a line.
"""

import os
import re
import sys

# comments, strings (raw ones too) and characters, in which nothing is code
OPAQUE = re.compile(
    r'//(?:\\\n|[^\n])*|/\*.*?\*/'
    r'|R"([^(]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9A-Fa-f])'(?:\\.|[^'\\\n])+'", re.DOTALL)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
KERNEL_TEMPLATE = re.compile(
    r"template\s*<([^;{}()]*)>\s*(?:static\s+|inline\s+)*__global__[^;{]*?\bvoid\b[^;{(]*?"
    r"(?:__launch_bounds__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*)?(\w+)\s*\(")


def blank(text):
    """The text with comments, strings and characters replaced by spaces: offsets stay the same."""
    return OPAQUE.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def matching(code, at, step):
    """The offset of the bracket that closes (step 1) or opens (step -1) the one at `at`."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    if step < 0:
        pairs = {close: open_ for open_, close in pairs.items()}
    same, other, depth = code[at], pairs[code[at]], 0
    while 0 <= at < len(code):
        depth += (code[at] == same) - (code[at] == other)
        if depth == 0:
            return at
        at += step
    raise ValueError("brackets do not match")


def split_commas(code):
    """Number of parts between the commas that stand outside of all brackets."""
    depth, parts = 0, 1 if code.strip() else 0
    for c in code:
        depth += (c in "([{<") - (c in ")]}>")
        parts += c == "," and depth == 0
    return parts


def kernel_start(code, end):
    """The offset where the kernel begins that ends before `end`: name, name<args> or (expression)."""
    while code[end - 1].isspace():
        end -= 1
    if code[end - 1] == ")":
        return matching(code, end - 1, -1)
    if code[end - 1] == ">":
        end = matching(code, end - 1, -1)
    return re.search(r"(?:[\w:.]|->)+\s*$", code[:end]).start()


def rewrite_launches(text, templates):
    code, edits = blank(text), []
    for match in re.finditer("<<<", code):
        start, at, depth = kernel_start(code, match.start()), match.end(), 0
        while depth > 0 or not code.startswith(">>>", at):
            depth += (code[at] in "([{") - (code[at] in ")]}")
            at += 1
        kernel = re.sub(r"[\s\\]+", " ", text[start:match.start()]).strip()
        name, _, given = kernel.partition("<")
        wanted = templates.get(name.split("::")[-1].strip(), 0)
        label = '"' + kernel.replace('"', '\\"') + '"'
        if wanted > split_commas(given.rpartition(">")[0]):  # the arguments of the call decide the rest
            edits.append((start, start, f"emu_launch_deduced({label}, [=](auto... emu_arg) {{ "))
            edits.append((match.start(), match.end(), "(emu_arg...); }, "))
        else:
            edits.append((start, start, f"emu_launch({label}, "))
            edits.append((match.start(), match.end(), ", "))
        edits.append((at, at + 3, ")"))
    return apply(text, edits)


def rewrite_shared(text):
    code, edits = blank(text), []
    for match in re.finditer(r"(\bextern\s+)?\b__shared__\b", code):
        end, depth = match.end(), 0
        while depth > 0 or code[end] != ";":
            depth += (code[end] in "([{") - (code[end] in ")]}")
            end += 1
        edits.append((match.start(), end, shared_declaration(code[match.end():end], bool(match.group(1)))))
    return apply(text, edits)


def shared_declaration(code, dynamic):
    """`float a[4], b` as typedefs and references: the type stands before the first declarator's name."""
    newlines, alignment = code.count("\n"), "0"
    code = re.sub(r"[\s\\]+", " ", code)
    for found in re.finditer(r"\b(?:alignas|__align__)\s*(?=\()", code):
        close = matching(code, found.end(), 1)
        alignment = code[found.end() + 1:close]
        code = code[:found.start()] + " " * (close + 1 - found.start()) + code[close + 1:]
    declarators, depth, last = [], 0, 0
    for i, c in enumerate(code + ","):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            declarators.append(code[last:i])
            last = i + 1
    first = re.match(r"(.*?[\s*&>}])(\w+)\s*((?:\[.*\])?)\s*$", declarators[0])
    if first is None:
        raise ValueError(f"cannot read the declaration __shared__ {code.strip()}")
    base, out = first.group(1).strip(), []
    for text in [first.group(2) + first.group(3)] + declarators[1:]:
        pointer, name, dimensions = re.match(r"\s*([*\s]*)(\w+)\s*((?:\[.*\])?)", text).groups()
        of_type = f"sizeof(emu_type_{name}), alignof(emu_type_{name})"
        place = "emu_dynamic_shared()" if dynamic else (
            f"emu_static_shared(&emu_place_{name}, {of_type}, {alignment})")
        out.append(f"typedef {base} {pointer}emu_type_{name}{dimensions}; " +
                   ("" if dynamic else f'static EmuPlace emu_place_{name} = {{"{name}", 0, 0}}; ') +
                   f"emu_type_{name}& {name} = *(emu_type_{name}*){place}")
    return "; ".join(out) + "\n" * newlines


def apply(text, edits):
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def main():
    out, source = sys.argv[1], os.path.relpath(sys.argv[2])
    found, waiting = {}, [source]
    while waiting:
        path = waiting.pop()
        if path in found or not os.path.exists(path):
            continue
        found[path] = open(path).read()
        here = os.path.dirname(path)
        for name in INCLUDE.findall(found[path]):
            beside = os.path.normpath(os.path.join(here, name))
            waiting.append(name if os.path.exists(name) else beside)
    templates = {}
    for text in found.values():
        for parameters, name in KERNEL_TEMPLATE.findall(blank(text)):
            templates[name] = split_commas(parameters)
    for path, text in found.items():
        print(path)
        try:
            new = rewrite_shared(rewrite_launches(text, templates))
        except ValueError as error:
            sys.exit(f"{path}: {error}")
        if new == text and path.endswith(".h"):
            continue  # the compiler reads the original
        target = os.path.join(out, re.sub(r"^(\.\./)+|^/", "", path))  # a scratch source may lie outside
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with open(target, "w") as file:
            file.write(f'#line 1 "{path}"\n{new}')


main()
