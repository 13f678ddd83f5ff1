"""What pip-audit found, in words that cannot be mistaken: `python -m stages.run.audit found.json`.

pip-audit exits 0 also when the service knew none of the packages. Here the exit says: 0 nothing known against any of them, 1 something is,
3 not all could be looked up. Only the standard library, so that it runs without the environment it is about.
"""
import json
import sys
from pathlib import Path


def told(file: Path) -> tuple[list[str], int]:
    """Lines to print and the exit code, of pip-audit's JSON."""
    try:
        packages = json.loads(file.read_text(encoding="utf-8"))["dependencies"]
    except (OSError, ValueError, KeyError):
        return ["audit: NOT DONE: pip-audit gave no answer, as without a network; nothing is known about the pinned packages"], 3
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    bad = [(p, v) for p in packages for v in p.get("vulns", [])]
    lines = [f"{p['name']} {p['version']}: {v['id']}; mended in {', '.join(v.get('fix_versions', [])) or 'no release'}" for p, v in bad]
    if skipped or not packages:
        lines.append(f"audit: NOT DONE for {len(skipped)} of {len(packages)} packages, which the service did not know: "
                     f"{', '.join(skipped[:5])}{', ...' if len(skipped) > 5 else ''}")
    lines.append(f"audit: {len(packages) - len(skipped)} packages looked up, {len(bad)} known vulnerabilities")
    return lines, 1 if bad else 3 if skipped or not packages else 0


if __name__ == "__main__":
    lines, code = told(Path(sys.argv[1]))
    print("\n".join(lines))
    sys.exit(code)
