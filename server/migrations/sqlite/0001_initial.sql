-- Times are milliseconds since 1970-01-01T00:00:00Z; digests are 32 raw bytes.

CREATE TABLE silos (
    silo_id    TEXT PRIMARY KEY,
    enrollment TEXT NOT NULL,
    first_seen INTEGER NOT NULL,
    last_seen  INTEGER NOT NULL
) STRICT;

CREATE TABLE jobs (
    seq             INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id          TEXT NOT NULL UNIQUE,
    request_id      TEXT NOT NULL UNIQUE,
    submitted_by    TEXT NOT NULL,
    submitted_at    INTEGER NOT NULL,
    spec_toml       TEXT NOT NULL,
    state           TEXT NOT NULL,
    reason          TEXT NOT NULL,
    round           INTEGER NOT NULL,
    adapter_version BLOB,
    started_at      INTEGER,
    ended_at        INTEGER
) STRICT;

CREATE INDEX jobs_by_state ON jobs (state, seq);

-- A silo's part in a job, over all rounds.
CREATE TABLE job_silos (
    job_id           TEXT NOT NULL REFERENCES jobs (job_id),
    silo_id          TEXT NOT NULL,
    declined_code    TEXT,
    declined_message TEXT,
    bytes_up         INTEGER NOT NULL,
    bytes_down       INTEGER NOT NULL,
    PRIMARY KEY (job_id, silo_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX job_silos_by_silo ON job_silos (silo_id);

-- Every adapter of a job; round 0 is the one that the server drew.
CREATE TABLE adapter_versions (
    job_id        TEXT NOT NULL REFERENCES jobs (job_id),
    round         INTEGER NOT NULL,
    version       BLOB NOT NULL,
    payload_bytes INTEGER NOT NULL,
    created_at    INTEGER NOT NULL,
    PRIMARY KEY (job_id, round)
) STRICT, WITHOUT ROWID;

CREATE INDEX adapter_versions_by_version ON adapter_versions (version);

CREATE TABLE rounds (
    job_id            TEXT NOT NULL REFERENCES jobs (job_id),
    round             INTEGER NOT NULL,
    phase             TEXT NOT NULL,
    base_version      BLOB NOT NULL,
    published_version BLOB,
    min_count         INTEGER NOT NULL,
    max_count         INTEGER,
    min_millis        INTEGER NOT NULL,
    max_millis        INTEGER NOT NULL,
    announced_at      INTEGER NOT NULL,
    ended_at          INTEGER,
    PRIMARY KEY (job_id, round)
) STRICT, WITHOUT ROWID;

-- The cohort of a round and what became of each silo's part. A contribution that was accepted or discarded has its payload's
-- digest and the receipt that its silo was given; the payload of an accepted one is the spool's file that `upload_id` names,
-- until the round has ended.
CREATE TABLE round_silos (
    job_id         TEXT NOT NULL,
    round          INTEGER NOT NULL,
    silo_id        TEXT NOT NULL,
    outcome        TEXT,
    reason         TEXT NOT NULL DEFAULT '',
    recorded_at    INTEGER,
    payload_digest BLOB,
    examples       INTEGER NOT NULL DEFAULT 0,
    receipt        BLOB,
    upload_id      BLOB,
    PRIMARY KEY (job_id, round, silo_id),
    FOREIGN KEY (job_id, round) REFERENCES rounds (job_id, round),
    CHECK ((payload_digest IS NULL) = (receipt IS NULL)),
    CHECK ((outcome IS NULL) = (recorded_at IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX round_silos_spooled ON round_silos (upload_id) WHERE upload_id IS NOT NULL;

CREATE TABLE leases (
    job_id     TEXT NOT NULL,
    round      INTEGER NOT NULL,
    silo_id    TEXT NOT NULL,
    token      BLOB NOT NULL,
    expires_at INTEGER NOT NULL,
    attempts   INTEGER NOT NULL,
    PRIMARY KEY (job_id, round, silo_id),
    FOREIGN KEY (job_id, round, silo_id) REFERENCES round_silos (job_id, round, silo_id)
) STRICT, WITHOUT ROWID;

-- Uploads in progress; the bytes are in the spool, in the file that `upload_id` names.
CREATE TABLE uploads (
    upload_id      BLOB NOT NULL PRIMARY KEY,
    job_id         TEXT NOT NULL,
    round          INTEGER NOT NULL,
    silo_id        TEXT NOT NULL,
    payload_digest BLOB NOT NULL,
    payload_bytes  INTEGER NOT NULL,
    examples       INTEGER NOT NULL,
    touched_at     INTEGER NOT NULL,
    UNIQUE (job_id, round, silo_id),
    FOREIGN KEY (job_id, round, silo_id) REFERENCES round_silos (job_id, round, silo_id)
) STRICT, WITHOUT ROWID;

-- Reported numbers; `seq` orders reports by when they last changed.
CREATE TABLE metric_reports (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id  TEXT NOT NULL REFERENCES jobs (job_id),
    round   INTEGER NOT NULL,
    silo_id TEXT NOT NULL,
    point   TEXT NOT NULL,
    metrics TEXT NOT NULL,
    UNIQUE (job_id, round, silo_id, point)
) STRICT;
