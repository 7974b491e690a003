"""The scripts below deploy/ at work on the real programs, for demo_files.rs; only sizes are made small.

    demo_files.py specifications FOLDER       every job of the demos, the experiment and its comparisons, as they stand, to FOLDER/*.toml
    demo_files.py demo FOLDER PROGRAMS BACKBONE        the demo; its files, its report.json and what it saw: FOLDER
    demo_files.py experiment FOLDER PROGRAMS BACKBONE  the experiment: one seed, and of each grid little
    demo_files.py artaug FOLDER PROGRAMS      the ArtAug demo until its job has got somewhere
    demo_files.py artaug-table METRICS        the table that the ArtAug demo ends with
"""

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
SPLITS = {"train": 48, "validation": 12, "test": 12}


def load(folder, name):
    """A script by its path: two folders have a run.py. What it imports comes from its own folder first."""
    for path in (DEPLOY / "demo", DEPLOY / folder):
        sys.path[:] = [str(path), *(other for other in sys.path if other != str(path))]
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", DEPLOY / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def replaced(text, changes):
    """The text with other values; each has to be there."""
    for old, new in changes.items():
        if old not in text:
            raise SystemExit(f"{old!r} is not in:\n{text}")
        text = text.replace(old, new)
    return text


# The committed backbone of the tests instead of MiniLM.
SMALL = {"hidden = 384\nlayers = 6": "hidden = 24\nlayers = 2", "layers = [4, 5]": "layers = [0, 1]", "max_length = 64": "max_length = 16"}


def make_tasks(names, out):
    """Tasks by the names of the real ones, with made-up rows whose label follows from a word, and tasks.json."""
    import tasks
    from sources import Row

    def rows(task):
        labels = ("0.5", "2.0") if task.problem == "regression" else ("fruit", "other")
        for number in range(400):
            word, label = (("apples", labels[0]), ("the", labels[1]))[number % 2]
            texts = (f"of {word} to" + " rai" * (number % 5), "to the rai")[: len(task.columns) - 1]
            yield Row(str(number), str(number), texts, label, f"{task.name} {number}")

    entries = []
    for task in tasks.TASKS:
        if task.name in names:
            # The first text of a row must differ for it to stay in more than one split.
            numbered = (dataclasses.replace(row, texts=(f"{row.texts[0]} {row.id}", *row.texts[1:])) for row in rows(task))
            entries.append(tasks.make_task(task, numbered, out, SPLITS, 0))
    (out / "tasks.json").write_text(json.dumps({"tasks": entries}), encoding="utf-8")
    return entries


def specifications(folder):
    """Every job as the scripts would submit it."""
    run = load("demo", "run")
    settings = run.Settings()
    silos = [run.Silo(name, {}) for name in run.DEMO_TASKS]
    commands = run.Commands(Path("programs"), folder, 1, 2)
    specs = {"demo": commands.job_spec(silos, settings), "demo-local": commands.job_spec(silos, settings, local=True)}
    artaug = load("artaug", "demo")
    specs["artaug"] = artaug.job_spec(artaug.Settings())
    runs = load("experiment", "runs")
    from arms import ARMS, COMPARISONS

    for name, sizes in (("full", runs.FULL), ("quick", runs.QUICK)):
        pairs = [(arm.name, setting) for arm in ARMS for setting in arm.grid]
        pairs += [pair for one in COMPARISONS for _, by_arm in one.cases for pair in by_arm.items()]
        for arm, setting in pairs:
            job = runs.Run(arm, setting, sizes.selection_seed)
            specs[f"{name}--{job.name()}"] = runs.specification(job, sizes)
    for name, text in specs.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return {"written": len(specs)}


def demo(folder, programs, backbone):
    """A run of the whole demo, with silos of every kind of task."""
    run = load("demo", "run")
    run.POLL_EVERY = 0.05
    settings = run.Settings(rounds=2, bottleneck=4, max_length=16)
    small = {key: value for key, value in SMALL.items() if "max_length" not in key}

    class Commands(run.Commands):
        """The real ones."""

        def job_spec(self, silos, settings, local=False):
            text = replaced(super().job_spec(silos, settings, local), small)
            # A round long enough that the daemons tell of its steps, which they do once a second.
            return text if local else replaced(text, {"[training]\n": "[training]\nepochs = 200\n"})

    class Demo(run.Demo):
        """The real one, which also keeps what the daemons said of themselves: words, and the most steps with them."""

        said = {}

        def _doing(self):
            found = super()._doing()
            for doing in found.values():
                self.said[doing.word] = max(self.said.get(doing.word, 0), doing.step)
            return found

    class Processes(run.Processes):
        """The real ones, which also remember what they have started."""

        started = {}

        def start(self, name, *words):
            pid = super().start(name, *words)
            self.started[name] = self._running[name]
            return pid

    entries = make_tasks(("spam", "gloss-pair", "tweet-rating"), folder / "tasks")
    silos = [run.Silo(entry["name"], entry) for entry in entries]
    commands = Commands(programs, run.prepare_work(folder), *run.free_ports(2))
    assert not commands.missing(), commands.missing()
    screen = io.StringIO()
    with Processes(folder / "logs") as processes:
        finished = Demo(commands, processes, run.Screen(screen), silos, settings).run(folder / "tasks", backbone)
        logs = [processes.log_path(f"local-{number}").read_text(encoding="utf-8") for number in (1, 2)]
    run.report.write(finished, folder / "report.html")
    table = run.progress.table(finished)
    local = {silo: number for log in logs for silo, number in run.rounds_simulated(log).items()}
    ended = {name: {"pid": child.pid, "code": child.returncode} for name, child in Processes.started.items()}
    return {"report": finished, "said": Demo.said, "local": local, "shown": screen.getvalue(), "table": table, "ended": ended}


def experiment(folder, programs, backbone):
    """Selection, measurement and page."""
    run = load("experiment", "run")
    import page
    import runs

    # A method that wins nothing on these rows is none the worse for it here.
    page.ADMISSION = -1.0
    whole = runs.specification
    runs.specification = lambda job, sizes: replaced(whole(job, sizes), SMALL)
    run.ARMS = tuple(dataclasses.replace(arm, grid=arm.grid[: 2 if arm.name == "fedmcp" else 1]) for arm in run.ARMS)

    class Bench(run.Bench):
        """The real one, with other rows."""

        def tasks(self, seed, names):
            out = self.folder / f"tasks-{seed}"
            make_tasks(("spam", "tweet-sentiment"), out)
            return out

    sizes = dataclasses.replace(run.QUICK, **SPLITS, rounds=2)
    bench = Bench(programs / "concord-client", backbone, folder, sizes)
    chosen = run.select(bench)
    rows = run.measure(bench, chosen)
    page.write({"sizes": vars(sizes), "chosen": chosen, "rows": rows, "quick": True}, folder)
    return {"arms": [arm.name for arm in run.ARMS], "chosen": chosen, "rows": rows}


def artaug(folder, programs):
    """Certificates, prompts, configurations, server, worker and job of the ArtAug demo, until pictures are drawn."""
    module = load("artaug", "demo")
    module.POLL_EVERY = 0.1
    commands = module.Commands(programs, module.prepare_work(folder), module.cache_folder(), *module.free_ports(2))
    assert not commands.missing(), commands.missing()

    class Far(Exception):
        """The job has got far enough."""

    class Demo(module.Demo):
        """The real one, but its job is cancelled."""

        def _show(self, job, elapsed):
            if job.progress and int(job.progress["done"]) > 0:
                raise Far(job.progress, module.line(job, elapsed, 200))

        def _follow(self, job_id):
            try:
                super()._follow(job_id)
            finally:
                self.processes.run("cancel", commands._operator("job", "cancel", job_id))

    # Many pairs: with few of them the job may end before anybody has looked.
    settings = module.Settings(iterations=1, pairs=192, held_out=4, threads=1)
    with module.Processes(folder / "logs") as processes:
        try:
            Demo(commands, processes, settings).run(folder / "results")
        except Far as far:
            progress, line = far.args
            return {"progress": progress, "line": line}
    raise SystemExit("the job ended before it had got anywhere")


def artaug_table(metrics):
    """What the ArtAug demo shows of its job's metrics.jsonl."""
    module = load("artaug", "demo")
    rows = metrics.read_text(encoding="utf-8").splitlines()
    return {"table": module.table([json.loads(row) for row in rows])}


def main():
    """Prints what the command gives as JSON, on the last line."""
    command, *paths = sys.argv[1:]
    known = {"specifications": specifications, "demo": demo, "experiment": experiment, "artaug": artaug, "artaug-table": artaug_table}
    print("\n" + json.dumps(known[command](*map(Path, paths))))


if __name__ == "__main__":
    main()
