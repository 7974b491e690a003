//! A real HTTP server on the loopback interface that plays proper and hostile answers, one a connection, in order. All are written by hand; none was
//! recorded from a model server.

pub(crate) mod bodies;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::{EndpointSettings, Until};

/// A time that never comes.
pub(crate) fn never() -> Until {
    Until::new(watch::channel(None).1)
}

pub(crate) fn key_file(text: &str, mode: u32) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    file
}

/// What the server does with one connection, after it has read the request.
#[derive(Debug, Clone)]
pub(crate) enum Play {
    /// A proper answer with a status line such as "200 OK", more headers, and a body.
    Answer(&'static str, &'static str, String),
    /// An answer with this status line that repeats the request's head, the key in it.
    Echo(&'static str),
    /// These bytes, then the end of the connection.
    Raw(Vec<u8>),
    /// These bytes, then the given ones again and again until the client has had enough.
    Endless(Vec<u8>, Vec<u8>),
    /// Nothing, until the client has had enough.
    Silence,
}

impl Play {
    pub(crate) fn ok(body: impl Into<String>) -> Self {
        Self::Answer("200 OK", "", body.into())
    }

    /// A chat completion that says `text`.
    pub(crate) fn says(text: &str) -> Self {
        Self::ok(
            json!({
                "id": "chatcmpl-1", "object": "chat.completion", "model": "test",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
            })
            .to_string(),
        )
    }
}

/// One request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) head: String,
    pub(crate) body: Value,
}

/// The server; it serves as many connections as it has plays.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl TestServer {
    pub(crate) fn start(plays: Vec<Play>) -> Self {
        Self::serve(plays, None)
    }

    pub(crate) fn start_tls(plays: Vec<Play>, config: rustls::ServerConfig) -> Self {
        Self::serve(plays, Some(Arc::new(config)))
    }

    fn serve(plays: Vec<Play>, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let received = Arc::clone(&requests);
        std::thread::spawn(move || {
            for play in plays {
                let Ok((mut stream, _)) = listener.accept() else {
                    return;
                };
                // No test waits longer; a client that never closes must not keep the thread.
                let patience = Some(Duration::from_secs(20));
                stream.set_read_timeout(patience).unwrap();
                stream.set_write_timeout(patience).unwrap();
                match &tls {
                    None => converse(&mut stream, play, &received),
                    Some(config) => {
                        let session = rustls::ServerConnection::new(Arc::clone(config)).unwrap();
                        let mut secured = rustls::StreamOwned::new(session, stream);
                        converse(&mut secured, play, &received);
                        secured.conn.send_close_notify();
                        let _ = secured.flush();
                    }
                }
            }
        });
        Self { address, requests }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// Settings for this server that do not make a test wait.
    pub(crate) fn settings(&self) -> EndpointSettings {
        EndpointSettings {
            timeout: Duration::from_secs(10),
            backoff: Duration::from_millis(1),
            ..EndpointSettings::new(&format!("http://{}/v1", self.address))
        }
    }
}

fn converse(stream: &mut (impl Read + Write), play: Play, received: &Mutex<Vec<Request>>) {
    let Some(request) = read_request(stream) else {
        return;
    };
    let head = request.head.clone();
    received.lock().unwrap().push(request);
    let mut send = |bytes: &[u8]| {
        stream
            .write_all(bytes)
            .and_then(|()| stream.flush())
            .is_ok()
    };
    match play {
        Play::Answer(status, headers, body) => {
            send(&answer(status, headers, &body));
        }
        Play::Echo(status) => {
            let body = json!({"error": {"message": head}}).to_string();
            send(&answer(status, "", &body));
        }
        Play::Raw(bytes) => {
            send(&bytes);
        }
        Play::Endless(first, again) => {
            if send(&first) {
                while send(&again) {}
            }
        }
        Play::Silence => {
            let _ = stream.read(&mut [0]);
        }
    }
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n{body}").into_bytes()
}

fn read_request(stream: &mut impl Read) -> Option<Request> {
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&received[..end]).into_owned();
            let length: usize = head.lines().find_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix("content-length: ")?
                    .parse()
                    .ok()
            })?;
            if received.len() >= end + 4 + length {
                let body = serde_json::from_slice(&received[end + 4..end + 4 + length]).unwrap();
                return Some(Request { head, body });
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(count) => received.extend_from_slice(&buffer[..count]),
        }
    }
}
