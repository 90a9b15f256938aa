"""Write the page of every rule into docs/rules/, from the rules themselves: python scripts/rule_pages.py [--check]"""

import argparse
from pathlib import Path

from normscope.cli.doctor import GROUPS, sections
from normscope.doctor import RULES
from normscope.doctor.remedies import REMEDIES
from normscope.report import words

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "rules"
WRITTEN = "<!-- written by scripts/rule_pages.py -->"


def page(rule):
    """A rule as Markdown."""
    (_, summary), *rest = sections(rule.page)
    lines = [WRITTEN, f"# {rule.code} {rule.name}", "", summary, ""]
    for heading, text in rest:
        lines += [f"## {heading}", "", words.sentence(text), ""]
    remedies = [code for code in REMEDIES if f"{code} [{REMEDIES[code].safety}]" in rule.page]
    if remedies:
        lines += ["| remedy | safety | what it does | how |", "|---|---|---|---|"]
        for code in remedies:
            spec = REMEDIES[code]
            how = spec.command.replace("{rule}", rule.code).replace("|", "\\|")
            lines.append(f"| {code} | {spec.safety}: {words.SAFETY[spec.safety]} | {spec.text} | `{how}` |")
        lines.append("")
    if rule.causes:
        links = ", ".join(f"[{code}]({code}.md)" for code in rule.causes)
        lines += ["## May follow from", "", links, ""]
    if rule.uses:
        lines += ["## Asked only where declared", "", ", ".join(f"`{use}`" for use in rule.uses), ""]
    return "\n".join(lines)


def index():
    """All rules in a table per group."""
    lines = [
        WRITTEN,
        "# The rules of the doctor",
        "",
        "`normscope rule CODE` prints a page, `normscope rules` this list.",
        "",
    ]
    for digit, title in GROUPS.items():
        found = [rule for code, rule in sorted(RULES.items()) if code[3] == digit]
        if found:
            lines += [f"## {digit}xx: {title}", "", "| rule | what it finds |", "|---|---|"]
            lines += [f"| [{r.code}]({r.code}.md) {r.name} | {sections(r.page)[0][1]} |" for r in found]
            lines.append("")
    return "\n".join(lines)


def pages():
    """File names and texts."""
    return {"README.md": index(), **{f"{code}.md": page(rule) for code, rule in sorted(RULES.items())}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    if check:
        raise SystemExit(int(there != wanted))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in there.keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
