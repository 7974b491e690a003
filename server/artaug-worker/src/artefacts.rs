//! What a job leaves behind: adapters for other tools, metrics, manifests, galleries, ledger, model card.
//!
//! Each is an object on the server under a name. They are made from the job's record alone, so making them again changes nothing but times
//! and costs.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use concord_artaug::{
    card::{CardFacts, model_card},
    folder::JobFolder,
    gallery::{Extent, Gallery, ReviewPage},
    losses,
    machine::{Machine, Made, Stage, Training},
};
use concord_common::{Digest, error_text};

use crate::{
    brake::Halt,
    remote::Payload,
    stages::{Job, Studio},
};

/// Room that is left to the model card when the fused model is brought before it.
const CARD_ROOM: u64 = 1 << 20;

/// Adapters of a finished iteration, and everything else as far as it is.
///
/// # Errors
/// If the job halts.
pub(crate) fn of_iteration(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<(), Halt> {
    let results = adapters(job, studio)?;
    record(job)?;
    card(job, results, None)
}

/// All results of a finished job.
///
/// # Errors
/// If the job halts.
pub(crate) fn of_job(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<(), Halt> {
    let mut results = adapters(job, studio)?;
    record(job)?;
    let mut left_out = None;
    if job.spec.output.fused {
        // After all else, for it is the largest: what has no room any more is missed least.
        let more = fused(job, studio)?;
        results.extend(more.results);
        left_out = more.left_out;
    }
    card(job, results, left_out)
}

/// The page on which an operator judges the pairs that wait.
///
/// # Errors
/// If the job halts.
pub(crate) fn for_review(job: &Job<'_>) -> Result<(), Halt> {
    let desk = job.desk;
    let id = &desk.lease().grip().job_id;
    let (iteration, page) = desk.look_at_folder(|folder| {
        let page = ReviewPage::of_job(folder, id, Extent::default(), &mut |digest| {
            fetch(job, folder, digest)
        });
        (folder.machine().iteration(), page)
    });
    desk.brake().check_now()?;
    let page = page.map_err(|error| desk.fail(error))?;
    let html = page.to_html().map_err(|error| desk.fail(error))?;
    put(job, &format!("review/iteration-{iteration}.html"), html)?;
    Ok(())
}

/// An object for a page; one that cannot be had is left out of it.
fn fetch(job: &Job<'_>, folder: &JobFolder, digest: Digest) -> Option<Vec<u8>> {
    if let Ok(bytes) = folder.store().get(digest) {
        return Some(bytes);
    }
    let fetched = job.desk.lease().get(digest).ok()??;
    Some(fetched.to_vec())
}

/// Brings a result to the server.
fn put(job: &Job<'_>, name: &str, bytes: impl Into<Bytes>) -> Result<(String, Digest), Halt> {
    let bytes = bytes.into();
    let digest = Digest::of(&bytes);
    job.desk
        .lease()
        .put_artefact(name, digest, Payload::Bytes(bytes))?;
    tracing::info!(artefact = name, "kept");
    Ok((name.to_owned(), digest))
}

/// Every iteration's own adapter, and the joined ones of the result: of the newest iteration while the job goes on.
fn adapters(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<Vec<(String, Digest)>, Halt> {
    let desk = job.desk;
    let (made, over, result) = desk.look(|machine| {
        let over = machine.result().is_some();
        (
            machine.made().to_vec(),
            over,
            machine.result_lora().cloned(),
        )
    });
    let mut results = Vec::new();
    // A job that goes on has brought the others already.
    let first = if over {
        0
    } else {
        made.len().saturating_sub(1)
    };
    for (index, made) in made.iter().enumerate().skip(first) {
        let Some(second) = made.trained.get(&Training::Second) else {
            continue;
        };
        let fitted = desk.object(second.lora)?;
        let own = studio.join(None, &fitted)?.merged;
        let folder = format!("lora/iteration-{}", index + 1);
        results.extend(export(job, studio, &folder, &own)?);
    }
    let joined = if over {
        result
    } else {
        made.last().and_then(|made| made.fused.clone())
    };
    if let Some(joined) = joined {
        let merged = desk.object(joined.merged)?;
        results.extend(export(job, studio, "lora/merged", &merged)?);
        if let Some(reduced) = joined.reduced {
            let reduced = desk.object(reduced)?;
            results.extend(export(job, studio, "lora/reduced", &reduced)?);
        }
    }
    Ok(results)
}

/// An adapter in the layouts of other tools.
fn export(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    folder: &str,
    lora: &[u8],
) -> Result<Vec<(String, Digest)>, Halt> {
    job.desk.check()?;
    let specification = job.desk.look(Machine::specification);
    // Nothing of times or machines: the same job gives the same bytes.
    let facts = [
        ("concord.job", job.spec.name.clone()),
        ("concord.adapter", folder.to_owned()),
        ("concord.base", job.spec.model.folder.clone()),
        ("concord.seed", job.spec.seed.to_string()),
        ("concord.specification", specification.to_string()),
        ("concord.version", env!("CARGO_PKG_VERSION").to_owned()),
    ]
    .map(|(key, text)| (key.to_owned(), text));
    let exported = studio.engine().export(lora, &facts);
    let files = exported.map_err(|error| studio.halt(error))?;
    files
        .into_iter()
        .map(|(name, bytes)| put(job, &format!("{folder}/{name}"), bytes))
        .collect()
}

/// What was brought of the fused model.
#[derive(Debug, Default)]
struct Fused {
    results: Vec<(String, Digest)>,
    /// Why it was left out, if so.
    left_out: Option<String>,
}

/// The whole model of the result, or nothing of it if the job has no room left for it: that is no reason to lose all else.
fn fused(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<Fused, Halt> {
    let desk = job.desk;
    let Some(joined) = desk.look(|machine| machine.result_lora().map(|lora| lora.merged)) else {
        return Ok(Fused::default()); // The result is the base itself.
    };
    let joined = desk.object(joined)?;
    let folder = job.folder.join("fused");
    let failed = |error: io::Error| desk.fail(format!("{}: {error}", folder.display()));
    remove(&folder).map_err(failed)?;
    check_base(job)?;
    let exported = studio.engine().export_fused(&joined, &folder);
    // Once more before any of it is shown to others, and before the engine is blamed.
    let unchanged = check_base(job);
    if unchanged.is_err() {
        remove(&folder).map_err(failed)?;
    }
    unchanged?;
    exported.map_err(|error| studio.halt(error))?;
    let mut files = Vec::new();
    for path in files_below(&folder).map_err(failed)? {
        desk.check()?;
        let (digest, bytes) = digest_of(&path).map_err(failed)?;
        files.push((path, digest, bytes));
    }
    let left_out = short_of_room(job, &files)?;
    let mut fused = Fused {
        left_out,
        ..Fused::default()
    };
    if fused.left_out.is_none() {
        for (path, digest, bytes) in files {
            desk.check()?;
            let below = path.strip_prefix(&folder).unwrap_or(&path);
            let name = format!("fused/{}", below.display());
            let payload = Payload::File(path.clone(), bytes);
            desk.lease().put_artefact(&name, digest, payload)?;
            fused.results.push((name, digest));
        }
    }
    remove(&folder).map_err(failed)?;
    Ok(fused)
}

/// Makes sure that the base model's folder holds what it held when this worker took the job up: the engine opens its files by name, and some of them
/// become part of a result.
fn check_base(job: &Job<'_>) -> Result<(), Halt> {
    let desk = job.desk;
    desk.check()?;
    let (known, found) = (&job.tools.card.base_files, (job.tools.base)());
    let found = found.map_err(|error| desk.trouble(error_text(&error)))?;
    let gone = known.iter().filter(|file| !found.contains(file));
    let strange = found.iter().filter(|file| !known.contains(file));
    match gone.chain(strange).next() {
        None => Ok(()),
        Some((name, _)) => Err(desk.trouble(format!(
            "{name} in the model's folder is not what it was when this worker took the job up, so no fused model is made of it; put back what the job \
             began with, or start the job anew"
        ))),
    }
}

/// What to say if files and the card that names them do not fit into what the job may keep. Those that are there already count once.
fn short_of_room(job: &Job<'_>, files: &[(PathBuf, Digest, u64)]) -> Result<Option<String>, Halt> {
    let lease = job.desk.lease();
    let digests: Vec<Digest> = files.iter().map(|(_, digest, _)| *digest).collect();
    let missing = lease.missing(&digests)?;
    let wanted: u64 = files
        .iter()
        .filter(|(_, digest, _)| missing.contains(digest))
        .map(|(_, _, bytes)| bytes)
        .sum();
    let (kept, most) = (lease.ask_kept()?, job.spec.limits.disk.bytes());
    if wanted == 0 || kept.saturating_add(wanted).saturating_add(CARD_ROOM) <= most {
        return Ok(None);
    }
    let said = format!(
        "The fused model was left out: it takes {} MiB, and the job keeps {} of the {} MiB that `limits.disk` allows. Merge the LoRA into the base instead.",
        wanted >> 20,
        kept >> 20,
        most >> 20
    );
    tracing::warn!(reason = said, "no fused model");
    Ok(Some(said))
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Files in a folder and those inside it, in the order of their names.
fn files_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut files = Vec::new();
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

fn digest_of(path: &Path) -> io::Result<(Digest, u64)> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok((hasher.finalize().into(), hasher.count()))
}

/// What is made from the job's record, but for the model card: metrics, manifests, losses, gallery, ledger.
fn record(job: &Job<'_>) -> Result<(), Halt> {
    let desk = job.desk;
    let iterations = desk.look(|machine| machine.history().len());
    let names = ["metrics.jsonl".to_owned(), "metrics.csv".to_owned()];
    let manifests = (1..=iterations).map(|number| format!("manifest-{number}.jsonl"));
    for name in names.into_iter().chain(manifests) {
        let path = job.folder.join(&name);
        let bytes =
            fs::read(&path).map_err(|error| desk.fail(format!("{}: {error}", path.display())))?;
        put(job, &name, bytes)?;
    }
    for (number, made) in (1..).zip(desk.look(|machine| machine.made().to_vec())) {
        curves(job, number, &made)?;
    }
    desk.note_memory();
    let (ledger, gallery) = desk.look_at_folder(|folder| {
        let notes = job.tools.card.limits.clone();
        let gallery = Gallery::of_job(
            folder,
            &job.spec.name,
            notes,
            Extent::default(),
            &mut |digest| fetch(job, folder, digest),
        );
        (ledger(folder), gallery)
    });
    desk.brake().check_now()?;
    let gallery = gallery.map_err(|error| desk.fail(error))?;
    let html = gallery.to_html().map_err(|error| desk.fail(error))?;
    put(job, "gallery.html", html)?;
    put(job, "ledger.json", ledger)?;
    Ok(())
}

/// The model card, which names the other results and comes after them. Where nothing but its own room is lacking, that is no reason to lose them: the
/// card that is there stays.
fn card(job: &Job<'_>, results: Vec<(String, Digest)>, remark: Option<String>) -> Result<(), Halt> {
    let mut facts = CardFacts {
        results,
        ..job.tools.card.clone()
    };
    facts.limits.extend(remark);
    let card = |folder: &JobFolder| model_card(job.spec, folder, &facts);
    let card = job.desk.look_at_folder(card);
    let (kept, most) = (job.desk.lease().ask_kept()?, job.spec.limits.disk.bytes());
    if kept.saturating_add(card.len() as u64) > most {
        tracing::warn!(
            kept,
            most,
            "no new model card: `limits.disk` of the job has no room for it"
        );
        return Ok(());
    }
    put(job, "MODEL_CARD.md", card)?;
    Ok(())
}

/// The losses of an iteration's trainings as tables.
fn curves(job: &Job<'_>, iteration: u32, made: &Made) -> Result<(), Halt> {
    for (training, trained) in &made.trained {
        let bytes = job.desk.object(trained.losses)?;
        let Some(losses) = losses::unpack(&bytes) else {
            return Err(job.desk.fail("a list of losses is damaged"));
        };
        let mut table = "step,loss\n".to_owned();
        for (step, loss) in losses.iter().enumerate() {
            let _ = writeln!(table, "{},{loss:.6}", step + 1);
        }
        let stage = Stage::from(*training).name();
        put(
            job,
            &format!("losses/iteration-{iteration}-{stage}.csv"),
            table,
        )?;
    }
    Ok(())
}

/// The ledger with the peak of memory.
fn ledger(folder: &JobFolder) -> Vec<u8> {
    let mut ledger = serde_json::json!(folder.ledger());
    ledger["peak_memory"] = serde_json::json!(folder.peak_memory());
    let worked = folder.worked();
    ledger["worked"] = serde_json::json!(worked.as_secs_f64());
    ledger["overlapped"] = serde_json::json!(folder.ledger().overlapped(worked));
    let mut text = ledger.to_string().into_bytes();
    text.push(b'\n');
    text
}
