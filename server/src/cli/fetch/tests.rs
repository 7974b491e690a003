use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use concord_common::chunk;
use futures::stream::{self, Iter};

use super::*;

/// A server that sends what a test says: objects by digest, and faults for the streams to come.
#[derive(Default)]
struct Fake {
    objects: BTreeMap<Vec<u8>, Bytes>,
    /// Applied to the pieces of the next streams, one each; then streams are whole.
    faults: VecDeque<Fault>,
    /// The offsets that were asked for.
    offsets: Vec<u64>,
}

type Pieces = Vec<Result<v1::GetArtefactResponse, Status>>;
type Fault = Box<dyn Fn(&mut Pieces)>;

impl Fake {
    fn with(contents: &[&[u8]]) -> Self {
        let objects = contents.iter().map(|content| {
            (
                Digest::of(content).to_vec(),
                Bytes::copy_from_slice(content),
            )
        });
        Self {
            objects: objects.collect(),
            ..Self::default()
        }
    }

    fn fault(mut self, fault: impl Fn(&mut Pieces) + 'static) -> Self {
        self.faults.push_back(Box::new(fault));
        self
    }
}

impl Source for Fake {
    type Pieces = Iter<std::vec::IntoIter<Result<v1::GetArtefactResponse, Status>>>;

    async fn open(&mut self, request: v1::GetArtefactRequest) -> Result<Self::Pieces, Status> {
        self.offsets.push(request.offset);
        let object = self.objects.get(&request.digest);
        let object = object.ok_or_else(|| Status::not_found("no such object"))?;
        let mut pieces: Pieces = chunk::chunks(object, request.offset, 4)
            .map(|chunk| {
                Ok(v1::GetArtefactResponse {
                    chunk: Some(chunk),
                    total: object.len() as u64,
                })
            })
            .collect();
        if let Some(fault) = self.faults.pop_front() {
            fault(&mut pieces);
        }
        Ok(stream::iter(pieces))
    }
}

fn artefact(name: &str, content: &[u8]) -> v1::Artefact {
    v1::Artefact {
        name: name.to_owned(),
        digest: Digest::of(content).to_vec(),
        bytes: content.len() as u64,
    }
}

async fn fetch_into(
    folder: &Path,
    server: &mut Fake,
    artefacts: &[v1::Artefact],
) -> Result<Vec<FetchedFile>, CliError> {
    fetch(server, "job", folder, &plan(artefacts)?, false).await
}

/// The names below a folder, hidden ones too.
fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn files_come_whole_with_their_folders_and_leave_no_parts() {
    let folder = tempfile::tempdir().unwrap();
    let into = folder.path().join("results");
    let mut server = Fake::with(&[b"0123456789", b"", b"same"]);
    let artefacts = [
        artefact("lora/merged.safetensors", b"0123456789"),
        artefact("empty", b""),
        artefact("first", b"same"),
        artefact("second", b"same"),
    ];
    let files = fetch_into(&into, &mut server, &artefacts).await.unwrap();
    assert!(files.iter().all(|file| file.written), "{files:?}");
    assert_eq!(
        fs::read(into.join("lora/merged.safetensors")).unwrap(),
        b"0123456789"
    );
    assert_eq!(fs::read(into.join("second")).unwrap(), b"same");
    assert_eq!(names_in(&into), ["empty", "first", "lora", "second"]);

    let again = fetch_into(&into, &mut Fake::default(), &artefacts)
        .await
        .unwrap();
    assert!(again.iter().all(|file| !file.written), "{again:?}");
}

#[tokio::test]
async fn other_content_is_refused_before_anything_is_fetched() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("b"), b"mine").unwrap();
    let mut server = Fake::with(&[b"one", b"two!"]);
    let artefacts = [artefact("a", b"one"), artefact("b", b"two!")];
    let error = fetch_into(folder.path(), &mut server, &artefacts)
        .await
        .unwrap_err();
    assert_eq!(error.exit(), Exit::Usage);
    assert!(error.to_string().contains("other content"), "{error}");
    assert!(error.to_string().contains("--replace"), "{error}");
    assert_eq!(fs::read(folder.path().join("b")).unwrap(), b"mine");
    assert_eq!(names_in(folder.path()), ["b"]);
    assert!(server.offsets.is_empty());

    let mut page = Wanted::named(&artefacts[1], "b".into()).unwrap();
    page.replaces = true;
    fetch(&mut server, "job", folder.path(), &[page], false)
        .await
        .unwrap();
    assert_eq!(fs::read(folder.path().join("b")).unwrap(), b"two!");
}

#[tokio::test]
async fn a_link_in_the_folder_is_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let (into, elsewhere) = (folder.path().join("into"), folder.path().join("elsewhere"));
    fs::create_dir(&into).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, into.join("lora")).unwrap();
    std::os::unix::fs::symlink(elsewhere.join("new"), into.join("file")).unwrap();
    for name in ["lora/x", "file"] {
        let mut server = Fake::with(&[b"bytes"]);
        let error = fetch_into(&into, &mut server, &[artefact(name, b"bytes")])
            .await
            .unwrap_err();
        assert!(error.to_string().contains("in the way"), "{error}");
    }
    assert!(names_in(&elsewhere).is_empty());
}

#[test]
fn a_hostile_list_of_names_is_refused_whole() {
    for names in [
        &["good", "../../.ssh/authorized_keys"][..],
        &["a", "a"],
        &["a", "a/b"],
    ] {
        let artefacts: Vec<_> = names.iter().map(|name| artefact(name, b"x")).collect();
        let error = plan(&artefacts).unwrap_err();
        assert_eq!(error.exit(), Exit::Untrusted, "{error}");
        assert!(error.to_string().contains("nothing was written"), "{error}");
    }
    let without_digest = v1::Artefact {
        digest: vec![1; 31],
        ..artefact("a", b"x")
    };
    assert_eq!(plan(&[without_digest]).unwrap_err().exit(), Exit::Untrusted);
}

#[tokio::test]
async fn what_was_received_before_an_interruption_is_taken_up_again() {
    let folder = tempfile::tempdir().unwrap();
    let artefacts = [artefact("a", b"0123456789")];
    let mut server = Fake::with(&[b"0123456789"]).fault(|pieces| {
        pieces.truncate(2);
        pieces.push(Err(Status::data_loss("the disk is gone")));
    });
    let error = fetch_into(folder.path(), &mut server, &artefacts)
        .await
        .unwrap_err();
    assert_eq!(error.exit(), Exit::Refused, "{error}");
    assert_eq!(names_in(folder.path()), [PARTS]);
    let files = fetch_into(folder.path(), &mut server, &artefacts)
        .await
        .unwrap();
    assert!(files[0].written);
    assert_eq!(server.offsets, [0, 8]);
    assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"0123456789");
    assert_eq!(names_in(folder.path()), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_off_is_opened_again_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Fake::with(&[b"0123456789"])
        .fault(|pieces| pieces.truncate(1))
        .fault(|pieces| {
            pieces.clear();
            pieces.push(Err(Status::unavailable("the connection is old")));
        });
    let artefacts = [artefact("a", b"0123456789")];
    fetch_into(folder.path(), &mut server, &artefacts)
        .await
        .unwrap();
    assert_eq!(server.offsets, [0, 4, 4]);
    assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"0123456789");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_sends_nothing_is_given_up_after_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Fake::with(&[b"0123456789"]);
    for _ in 0..1000 {
        server = server.fault(Vec::clear);
    }
    let artefacts = [artefact("a", b"0123456789")];
    let error = fetch_into(folder.path(), &mut server, &artefacts)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("after 0 of 10 bytes"), "{error}");
    let tries = server.offsets.len() as u64;
    assert!((50..80).contains(&tries), "{tries} tries");
}

/// A server that does not answer, or answers and then sends nothing.
struct Silent {
    answers: bool,
    tries: u32,
}

impl Source for Silent {
    type Pieces = stream::Pending<Result<v1::GetArtefactResponse, Status>>;

    async fn open(&mut self, _: v1::GetArtefactRequest) -> Result<Self::Pieces, Status> {
        self.tries += 1;
        if !self.answers {
            std::future::pending::<()>().await;
        }
        Ok(stream::pending())
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_falls_silent_within_a_stream_is_given_up_after_a_while() {
    for answers in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Silent { answers, tries: 0 };
        let wanted = plan(&[artefact("a", b"0123456789")]).unwrap();
        let begin = Instant::now();
        let error = fetch(&mut server, "job", folder.path(), &wanted, false)
            .await
            .unwrap_err();
        assert_eq!(error.exit(), Exit::Unreachable, "{error}");
        assert!(error.to_string().contains("sent nothing"), "{error}");
        assert!(begin.elapsed() < PATIENCE * 3, "{:?}", begin.elapsed());
        assert!(server.tries > 1);
    }
}

#[tokio::test]
async fn a_damaged_part_is_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    let parts = folder.path().join(PARTS);
    fs::create_dir(&parts).unwrap();
    let part = parts.join(Digest::of(b"0123456789").to_string());
    for (before, offsets) in [(&b"0X23"[..], &[4, 0][..]), (b"0123456789 and more", &[0])] {
        let _ = fs::create_dir(&parts);
        fs::write(&part, before).unwrap();
        let mut server = Fake::with(&[b"0123456789"]);
        let artefacts = [artefact("a", b"0123456789")];
        fetch_into(folder.path(), &mut server, &artefacts)
            .await
            .unwrap();
        assert_eq!(server.offsets, offsets);
        let file = folder.path().join("a");
        assert_eq!(fs::read(&file).unwrap(), b"0123456789");
        fs::remove_file(file).unwrap();
    }
}

#[tokio::test]
async fn bytes_that_are_not_what_was_announced_get_no_name() {
    fn first(pieces: &mut Pieces) -> &mut v1::GetArtefactResponse {
        pieces[0].as_mut().unwrap()
    }
    fn first_chunk(pieces: &mut Pieces) -> &mut v1::Chunk {
        first(pieces).chunk.as_mut().unwrap()
    }
    let faults: [(&str, Fault); 7] = [
        ("no bytes", Box::new(|pieces| first(pieces).chunk = None)),
        ("the list said", Box::new(|pieces| first(pieces).total = 11)),
        (
            "has 0 bytes",
            Box::new(|pieces| *first_chunk(pieces) = chunk::chunk(0, Bytes::new())),
        ),
        ("for byte 4", Box::new(|pieces| drop(pieces.remove(0)))),
        (
            "beyond",
            Box::new(|pieces| *first_chunk(pieces) = chunk::chunk(0, vec![7; 11].into())),
        ),
        (
            "digest than it says",
            Box::new(|pieces| first_chunk(pieces).data = "XXXX".into()),
        ),
        (
            "instead of",
            Box::new(|pieces| {
                let chunks = chunk::chunks(&"XXXX456789".into(), 0, 4);
                for (piece, chunk) in pieces.iter_mut().zip(chunks) {
                    piece.as_mut().unwrap().chunk = Some(chunk);
                }
            }),
        ),
    ];
    for (part, fault) in faults {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Fake::with(&[b"0123456789"]);
        server.faults.push_back(fault);
        let artefacts = [artefact("a", b"0123456789")];
        let error = fetch_into(folder.path(), &mut server, &artefacts)
            .await
            .unwrap_err();
        assert_eq!(error.exit(), Exit::Untrusted, "{error}");
        assert!(error.to_string().contains(part), "{part}: {error}");
        assert!(!folder.path().join("a").exists(), "{part}");
        // The next command is not disturbed by it.
        fetch_into(folder.path(), &mut server, &artefacts)
            .await
            .unwrap();
        assert_eq!(
            fs::read(folder.path().join("a")).unwrap(),
            b"0123456789",
            "{part}"
        );
    }
}

#[tokio::test]
async fn two_commands_do_not_write_the_same_part() {
    let folder = tempfile::tempdir().unwrap();
    let parts = folder.path().join(PARTS);
    fs::create_dir(&parts).unwrap();
    let part = parts.join(Digest::of(b"x").to_string());
    let other = Part::open(part, 1).unwrap();
    let mut server = Fake::with(&[b"x"]);
    let artefacts = [artefact("a", b"x")];
    let error = fetch_into(folder.path(), &mut server, &artefacts)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another command"), "{error}");
    drop(other);
    fetch_into(folder.path(), &mut server, &artefacts)
        .await
        .unwrap();
}
