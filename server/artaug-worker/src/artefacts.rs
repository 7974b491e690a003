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
use concord_common::Digest;

use crate::{
    brake::Halt,
    remote::Payload,
    stages::{Job, Studio},
};

/// Folders below a job's own in which files are put together before they are brought to the server.
const EXPORTS: &str = "exports";
const FUSED: &str = "fused";

/// Room that is left to the model card when the fused model is brought before it.
const CARD_ROOM: u64 = 1 << 20;

/// Adapters of a finished iteration, and everything else as far as it is.
///
/// # Errors
/// If the job halts.
pub(crate) fn of_iteration(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<(), Halt> {
    let results = adapters(job, studio)?;
    let left_out = record(job)?;
    card(job, results, left_out)
}

/// All results of a finished job.
///
/// # Errors
/// If the job halts.
pub(crate) fn of_job(job: &Job<'_>, studio: &mut Studio<'_>) -> Result<(), Halt> {
    let mut results = adapters(job, studio)?;
    let mut left_out = record(job)?;
    if job.spec.output.fused {
        // After all else, for it is the largest: what has no room any more is missed least.
        let more = fused(job, studio)?;
        results.extend(more.results);
        left_out.extend(more.left_out);
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

/// Brings a page or a table that all else can do without, unless the job may not keep so much more: then it says so.
fn put_if_room(job: &Job<'_>, name: &str, bytes: impl Into<Bytes>) -> Result<Option<String>, Halt> {
    let bytes: Bytes = bytes.into();
    let file = (Digest::of(&bytes), bytes.len() as u64);
    let left_out = short_of_room(job, name, &[file], 0)?;
    if left_out.is_none() {
        put(job, name, bytes)?;
    }
    Ok(left_out)
}

/// Every iteration's own adapter, and the joined ones of the result: of the newest iteration while the job goes on. All of them each time, for the
/// card names them; what the server has is not sent again.
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
    for (index, made) in made.iter().enumerate() {
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
    let under_way = job.folder.join(EXPORTS);
    clear(&under_way)?;
    let exported = studio.engine().export(lora, &facts, &under_way);
    // What is left of one that failed would keep a full disk full.
    clear(&under_way)?;
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
    let folder = job.folder.join(FUSED);
    clear(&folder)?;
    let fused = fused_in(job, studio, &joined, &folder);
    // Whatever came of it: what is left would keep a full disk full.
    clear(&folder)?;
    fused
}

/// Writes the whole model into a folder that is not there yet, and brings it from there.
fn fused_in(
    job: &Job<'_>,
    studio: &mut Studio<'_>,
    joined: &[u8],
    folder: &Path,
) -> Result<Fused, Halt> {
    let desk = job.desk;
    let unreadable = |error: io::Error| desk.trouble(format!("{}: {error}", folder.display()));
    studio.check_base()?;
    let exported = studio.engine().export_fused(joined, folder);
    // Once more before any of it is shown to others, and before the engine is blamed.
    studio.check_base()?;
    exported.map_err(|error| studio.halt(error))?;
    let mut files = Vec::new();
    for path in files_below(folder).map_err(unreadable)? {
        desk.check()?;
        let (digest, bytes) = digest_of(&path).map_err(unreadable)?;
        files.push((path, digest, bytes));
    }
    let sizes: Vec<(Digest, u64)> = files
        .iter()
        .map(|(_, digest, bytes)| (*digest, *bytes))
        .collect();
    let left_out = short_of_room(job, "The fused model", &sizes, CARD_ROOM)?;
    let mut fused = Fused {
        left_out: left_out.map(|said| said + " Merge the LoRA into the base instead."),
        ..Fused::default()
    };
    if fused.left_out.is_none() {
        for (path, digest, bytes) in files {
            desk.check()?;
            let below = path.strip_prefix(folder).unwrap_or(&path);
            let name = format!("fused/{}", below.display());
            let payload = Payload::File(path.clone(), bytes);
            desk.lease().put_artefact(&name, digest, payload)?;
            fused.results.push((name, digest));
        }
    }
    Ok(fused)
}

/// Removes what a kill left of files that were put together below a job's folder.
///
/// # Errors
/// [`Halt::Trouble`] if the file system refuses.
pub(crate) fn sweep(folder: &Path) -> Result<(), Halt> {
    [EXPORTS, FUSED]
        .iter()
        .try_for_each(|name| clear(&folder.join(name)))
}

/// What to say of a result whose files do not fit into what the job may keep, with so much to spare; that is no reason to lose all else. Those that
/// are there already count once.
fn short_of_room(
    job: &Job<'_>,
    what: &str,
    files: &[(Digest, u64)],
    spare: u64,
) -> Result<Option<String>, Halt> {
    let lease = job.desk.lease();
    let digests: Vec<Digest> = files.iter().map(|(digest, _)| *digest).collect();
    let missing = lease.missing(&digests)?;
    let wanted: u64 = files
        .iter()
        .filter(|(digest, _)| missing.contains(digest))
        .map(|(_, bytes)| bytes)
        .sum();
    let (kept, most) = (lease.ask_kept()?, job.spec.limits.disk.bytes());
    if wanted == 0 || kept.saturating_add(wanted).saturating_add(spare) <= most {
        return Ok(None);
    }
    let [wanted, kept, most] = [wanted, kept, most].map(|bytes| bytes as f64 / f64::from(1 << 20));
    let said = format!(
        "{what} was left out: it takes {wanted:.1} MiB, and the job keeps {kept:.1} of the {most:.1} MiB that `limits.disk` allows."
    );
    tracing::warn!("{said}");
    Ok(Some(said))
}

/// Removes a folder, if it is there.
fn clear(folder: &Path) -> Result<(), Halt> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Halt::Trouble(format!(
            "{}: {error}; remove it by hand",
            folder.display()
        ))),
        _ => Ok(()),
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

/// What is made from the job's record, but for the model card: metrics, losses, ledger, and then what is large. Gives what to say of that which had
/// no room.
fn record(job: &Job<'_>) -> Result<Vec<String>, Halt> {
    let desk = job.desk;
    let made = desk.look(|machine| machine.made().to_vec());
    for name in ["metrics.jsonl", "metrics.csv"] {
        put(job, name, read(job, name)?)?;
    }
    for (number, made) in (1..).zip(&made) {
        curves(job, number, made)?;
    }
    desk.note_memory();
    put(job, "ledger.json", desk.look_at_folder(ledger))?;
    let mut left_out = Vec::new();
    for number in 1..=made.len() {
        let manifest = format!("manifest-{number}.jsonl");
        left_out.extend(put_if_room(job, &manifest, read(job, &manifest)?)?);
        let held_out = format!("held-out-{number}.jsonl");
        // There is none of an iteration that drew no held-out image.
        if job.folder.join(&held_out).exists() {
            left_out.extend(put_if_room(job, &held_out, read(job, &held_out)?)?);
        }
    }
    let gallery = desk.look_at_folder(|folder| {
        let notes = job.tools.card.limits.clone();
        Gallery::of_job(
            folder,
            &job.spec.name,
            notes,
            Extent::default(),
            &mut |digest| fetch(job, folder, digest),
        )
    });
    desk.brake().check_now()?;
    let gallery = gallery.map_err(|error| desk.unkept(error))?;
    let html = gallery.to_html().map_err(|error| desk.fail(error))?;
    let page = put_if_room(job, "gallery.html", html)?;
    left_out.extend(page.map(|said| said + " If there is one, it is of an earlier iteration."));
    Ok(left_out)
}

/// A file of the job's folder. It was written from the journal, and is written again when the job is taken up.
fn read(job: &Job<'_>, name: &str) -> Result<Vec<u8>, Halt> {
    let path = job.folder.join(name);
    let trouble = |error: io::Error| job.desk.trouble(format!("{}: {error}", path.display()));
    fs::read(&path).map_err(trouble)
}

/// The model card, which names the other results and what was left out, and comes after them. Without room for it the card that is there stays.
fn card(job: &Job<'_>, results: Vec<(String, Digest)>, left_out: Vec<String>) -> Result<(), Halt> {
    let mut facts = CardFacts {
        results,
        ..job.tools.card.clone()
    };
    facts.limits.extend(left_out);
    let card = |folder: &JobFolder| model_card(job.spec, folder, &facts);
    let card = job.desk.look_at_folder(card);
    put_if_room(job, "MODEL_CARD.md", card)?;
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
