//! Nothing private leaves: a relay in the server's place records every byte that a daemon sends, and none of the canaries that
//! were planted in its data, nor any piece of what its vault holds, is among them.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use concord_common::{Digest, Role, config::TlsSection, tls};
use concord_integration_tests::harness::{Daemon, Federation, PATIENCE, Task, wait_for};
use concord_proto::v1;
use prost::Message as _;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    daemon::{federation, job, tasks},
    operator_of, runtime, submit,
};

/// What the daemon sent on each of its connections.
type Sent = Arc<Mutex<Vec<Vec<u8>>>>;

/// Stands between a daemon and the server: to the daemon it is the server, to the server it is the daemon.
struct Relay {
    address: SocketAddr,
    sent: Sent,
}

impl Relay {
    fn start(federation: &Federation, silo: &TlsSection) -> Self {
        let (identity, roots) = federation
            .issue(Role::Server, "relay")
            .unwrap()
            .load()
            .unwrap();
        let acceptor =
            TlsAcceptor::from(tls::server_config(&identity, &roots, federation.name()).unwrap());
        let (identity, roots) = silo.load().unwrap();
        let connector =
            TlsConnector::from(tls::client_config(&identity, &roots, federation.name()).unwrap());
        let server = federation.grpc_address();
        let sent = Sent::default();
        let listener = runtime()
            .block_on(TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let noted = Arc::clone(&sent);
        runtime().spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, connector, noted) =
                    (acceptor.clone(), connector.clone(), Arc::clone(&noted));
                runtime().spawn(async move {
                    // A connection that breaks off ends here; the daemon makes another.
                    let _ = relay(socket, &acceptor, &connector, server, &noted).await;
                });
            }
        });
        Self { address, sent }
    }

    fn connections(&self) -> Vec<Vec<u8>> {
        self.sent.lock().unwrap().clone()
    }
}

async fn relay(
    socket: TcpStream,
    acceptor: &TlsAcceptor,
    connector: &TlsConnector,
    server: SocketAddr,
    sent: &Sent,
) -> io::Result<()> {
    let (mut from_daemon, mut to_daemon) = tokio::io::split(acceptor.accept(socket).await?);
    let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
    let upstream = connector
        .connect(name, TcpStream::connect(server).await?)
        .await?;
    let (mut from_server, mut to_server) = tokio::io::split(upstream);
    let index = {
        let mut sent = sent.lock().unwrap();
        sent.push(Vec::new());
        sent.len() - 1
    };
    let up = async {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let count = from_daemon.read(&mut buffer).await?;
            if count == 0 {
                return to_server.shutdown().await;
            }
            sent.lock().unwrap()[index].extend_from_slice(&buffer[..count]);
            to_server.write_all(&buffer[..count]).await?;
            to_server.flush().await?;
        }
    };
    let down = async {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let count = from_server.read(&mut buffer).await?;
            if count == 0 {
                return to_daemon.shutdown().await;
            }
            to_daemon.write_all(&buffer[..count]).await?;
            to_daemon.flush().await?;
        }
    };
    tokio::try_join!(up, down).map(|_| ())
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame of HTTP/2 (RFC 9113 section 4.1).
struct Frame<'a> {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: &'a [u8],
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;

/// The frames of a connection as far as it was recorded.
fn frames(connection: &[u8]) -> Vec<Frame<'_>> {
    let mut rest = connection
        .strip_prefix(PREFACE)
        .expect("the daemon speaks HTTP/2");
    let mut found = Vec::new();
    while let Some((header, after)) = rest.split_at_checked(9) {
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let Some((payload, next)) = after.split_at_checked(length) else {
            break;
        };
        found.push(Frame {
            kind: header[3],
            flags: header[4],
            stream: u32::from_be_bytes([header[5] & 0x7f, header[6], header[7], header[8]]),
            payload,
        });
        rest = next;
    }
    found
}

/// The bodies of a connection's streams: the DATA frames without what stands between them.
fn bodies(connection: &[u8]) -> Vec<Vec<u8>> {
    let mut streams: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for frame in frames(connection) {
        if frame.kind == DATA {
            assert_eq!(frame.flags & 0x8, 0, "a padded frame");
            streams
                .entry(frame.stream)
                .or_default()
                .extend_from_slice(frame.payload);
        }
    }
    streams.into_values().collect()
}

/// What stands in the heads of a connection's requests, line by line. They are compressed and Huffman-coded (RFC 7541), so
/// that no text could be found in the bytes: a server of HTTP/2 reads them once more.
async fn heads(connection: &[u8]) -> BTreeSet<String> {
    let requests = frames(connection)
        .iter()
        .filter(|frame| frame.kind == HEADERS)
        .count();
    let (replayed, mut recorded) = tokio::io::simplex(connection.len());
    recorded.write_all(connection).await.unwrap();
    // No window and no limit of this server's is smaller than the real one's was.
    let mut server = h2::server::Builder::new()
        .initial_window_size(u32::MAX >> 1)
        .initial_connection_window_size(u32::MAX >> 1)
        .max_frame_size((1 << 24) - 1)
        .max_pending_accept_reset_streams(requests)
        .handshake::<_, &'static [u8]>(tokio::io::join(replayed, tokio::io::sink()))
        .await
        .unwrap();
    let mut lines = BTreeSet::new();
    let mut open = Vec::new();
    while open.len() < requests {
        let (request, answer) = tokio::time::timeout(PATIENCE, server.accept())
            .await
            .expect("every header block is the head of a request")
            .unwrap()
            .unwrap();
        lines.insert(format!("{} {}", request.method(), request.uri()));
        for (name, value) in request.headers() {
            lines.insert(format!("{name}: {}", value.to_str().unwrap()));
        }
        open.push((request, answer));
    }
    lines
}

/// Whether a line of a head says no more than which call it is, and by which program.
fn is_plain(line: &str, calls: &str) -> bool {
    let version = |rest: &str| rest.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let name = |rest: &str| rest.bytes().all(|b| b.is_ascii_alphabetic());
    line == "content-type: application/grpc"
        || line == "te: trailers"
        || line.strip_prefix("user-agent: tonic/").is_some_and(version)
        || line.strip_prefix(calls).is_some_and(name)
}

/// The gRPC messages of a body.
fn messages(body: &[u8]) -> Vec<&[u8]> {
    let mut rest = body;
    let mut found = Vec::new();
    while let Some((prefix, after)) = rest.split_at_checked(5) {
        assert_eq!(prefix[0], 0, "a compressed message could hide something");
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        let Some((message, next)) = after.split_at_checked(length) else {
            break;
        };
        found.push(message);
        rest = next;
    }
    found
}

/// The payloads that were uploaded: what the chunks of a body come to, if it is an upload.
fn uploads(bodies: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let chunks = |body: &[u8]| -> Option<Vec<u8>> {
        let mut payload = Vec::new();
        for message in messages(body) {
            let chunk = v1::UploadContributionRequest::decode(message).ok()?.chunk?;
            payload.extend_from_slice(&chunk.data);
            if chunk.digest != Digest::of(&payload).as_bytes() {
                return None;
            }
        }
        (!payload.is_empty()).then_some(payload)
    };
    bodies.iter().filter_map(|body| chunks(body)).collect()
}

/// Four numbers in a row, as they lie in memory.
type Window = [u8; 16];

/// The windows of some tensors' bytes that cannot be there by accident: four unlike numbers of a usual size, and no text.
fn windows(bytes: &[u8]) -> HashSet<Window> {
    bytes
        .as_chunks::<4>()
        .0
        .windows(4)
        .filter(|window| {
            let unlike = window.iter().collect::<HashSet<_>>().len() == 4;
            let usual = window
                .iter()
                .all(|bytes| (1e-8..1e4).contains(&f32::from_le_bytes(*bytes).abs()));
            let text = window
                .iter()
                .flatten()
                .all(|byte| (b' '..=b'~').contains(byte));
            unlike && usual && !text
        })
        .map(|window| window.concat().try_into().unwrap())
        .collect()
}

/// How many places of `haystack`, at any offset, show one of the windows.
fn hits(haystack: &[u8], needles: &HashSet<Window>) -> usize {
    haystack
        .windows(16)
        .filter(|place| needles.contains::<[u8]>(place))
        .count()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|place| place == needle)
}

/// The bodies of the vault's files as they are now: adapters, head, optimiser state, best model.
fn vault_bodies(state: &Path) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut folders = vec![state.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "vault")
            {
                // Replaced by renaming, so that a file that can be read is whole.
                let bytes = fs::read(path).unwrap_or_default();
                // Magic, version, header's size, body's size, digest: see the vault's own documentation.
                if let Some(size) = bytes.get(12..16) {
                    let header = u32::from_le_bytes(size.try_into().unwrap()) as usize;
                    found.push(bytes[56 + header..].to_vec());
                }
            }
        }
    }
    found
}

/// The remote ports of a process's TCP connections.
fn remote_ports(pid: u32) -> HashSet<u16> {
    let inodes: HashSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter_map(|link| {
            let text = link.to_str()?.strip_prefix("socket:[")?;
            Some(text.trim_end_matches(']').to_owned())
        })
        .collect();
    ["tcp", "tcp6", "udp", "udp6"]
        .iter()
        .flat_map(|kind| {
            let table = fs::read_to_string(format!("/proc/{pid}/net/{kind}")).unwrap_or_default();
            table.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
        })
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            inodes.contains(*fields.get(9)?).then_some(())?;
            let (_, port) = fields[2].rsplit_once(':')?;
            u16::from_str_radix(port, 16).ok()
        })
        .filter(|port| *port != 0)
        .collect()
}

/// Starts the three silos, the first of them through the relay and with canaries in its data.
fn silos(federation: &Federation) -> (Relay, Vec<Daemon>) {
    let relay = Relay::start(federation, &federation.issue(Role::Silo, "silo-a").unwrap());
    let mut daemons = Vec::new();
    for (name, task) in tasks() {
        let (address, task) = if name == "silo-a" {
            let planted = Task {
                mark: "canarytext",
                labels: vec!["canarylabel", "other"],
                ..task
            };
            (relay.address, planted)
        } else {
            (federation.grpc_address(), task)
        };
        let mut daemon = Daemon::new(federation, name, &address.to_string(), &task).unwrap();
        daemon.start(&[]).unwrap();
        daemons.push(daemon);
    }
    (relay, daemons)
}

#[test]
fn nothing_of_the_data_the_vault_or_the_machine_is_in_the_bytes_that_a_daemon_sends() {
    let federation = federation();
    let (relay, mut daemons) = silos(&federation);
    let state: PathBuf = daemons[0].folder().join("state");
    let pid = daemons[0].program().unwrap().pid();
    let job_id = runtime().block_on(submit(&mut operator_of(&federation), job(3)));

    let mut private: HashSet<Window> = HashSet::new();
    let mut ports = HashSet::new();
    wait_for("finished job", PATIENCE * 3, || {
        private.extend(vault_bodies(&state).iter().flat_map(|body| windows(body)));
        ports.extend(remote_ports(pid));
        let request = v1::GetJobRequest {
            job_id: job_id.clone(),
        };
        let shown = runtime().block_on(operator_of(&federation).get_job(request))?;
        let tested = shown.into_inner().metrics.iter().any(|report| {
            report.silo_id == "silo-a" && report.point() == v1::MetricPoint::LastTest
        });
        Ok(tested.then_some(()))
    })
    .unwrap();
    private.extend(vault_bodies(&state).iter().flat_map(|body| windows(body)));

    // The relay has seen all of it, and the search finds what is there: the updates, piece by piece.
    assert_eq!(ports, HashSet::from([relay.address.port()]));
    let connections = relay.connections();
    let bodies: Vec<Vec<u8>> = connections.iter().flat_map(|sent| bodies(sent)).collect();
    let uploaded = uploads(&bodies);
    for round in 1..=3 {
        let request = v1::GetRoundRequest {
            job_id: job_id.clone(),
            round,
        };
        let shown = runtime()
            .block_on(operator_of(&federation).get_round(request))
            .unwrap()
            .into_inner();
        let silo = shown
            .silos
            .iter()
            .find(|silo| silo.silo_id == "silo-a")
            .unwrap();
        let update = uploaded
            .iter()
            .find(|payload| Digest::of(payload).as_bytes()[..] == silo.payload_digest)
            .unwrap_or_else(|| panic!("the update of round {round} was not recorded"));
        let all: Vec<u8> = bodies.concat();
        assert!(hits(&all, &windows(update)) > 100);
    }
    assert!(bodies.iter().any(|body| contains(body, b"accuracy")));
    assert!(
        private.len() > 1000,
        "only {} pieces of the vault were seen",
        private.len()
    );

    let calls = format!(
        "POST https://{}/concord.v1.FederationService/",
        relay.address
    );
    let mut lines = BTreeSet::new();
    for sent in &connections {
        lines.extend(runtime().block_on(heads(sent)));
    }
    assert!(
        lines.contains(&format!("{calls}UploadContribution")),
        "{lines:?}"
    );
    for line in &lines {
        assert!(is_plain(line, &calls), "{line} was sent in a head");
    }

    let folder = daemons[0].folder().to_str().unwrap().to_owned();
    let hidden: [&[u8]; 5] = [
        b"canarytext",
        b"canarylabel",
        b"apples",
        folder.as_bytes(),
        b"BEGIN PRIVATE KEY",
    ];
    for bytes in bodies.iter().chain(&connections) {
        assert_eq!(hits(bytes, &private), 0, "a piece of the vault was sent");
        for needle in hidden {
            assert!(
                !contains(bytes, needle),
                "{} was sent",
                String::from_utf8_lossy(needle)
            );
        }
    }
}
