-- Jobs that a worker runs (kind `artaug`): who holds them, their journal, objects and results.

ALTER TABLE jobs ADD COLUMN kind TEXT NOT NULL DEFAULT 'federated-training';

CREATE INDEX jobs_by_kind ON jobs (kind, state, seq);

-- One row for every job that a worker runs, from its submission on. `token` is null while no worker holds the job.
-- `idle_attempts` counts the leases in a row that ran out and had added nothing to the journal. `quota` bounds the journal's and
-- the objects' bytes together. `progress` is a message of the protocol.
CREATE TABLE worker_jobs (
    job_id            TEXT PRIMARY KEY REFERENCES jobs (job_id),
    quota             INTEGER NOT NULL,
    paused            INTEGER NOT NULL DEFAULT 0,
    worker            TEXT,
    token             BLOB,
    expires_at        INTEGER,
    attempts          INTEGER NOT NULL DEFAULT 0,
    idle_attempts     INTEGER NOT NULL DEFAULT 0,
    lines_at_claim    INTEGER NOT NULL DEFAULT 0,
    lines             INTEGER NOT NULL DEFAULT 0,
    journal_bytes     INTEGER NOT NULL DEFAULT 0,
    object_bytes      INTEGER NOT NULL DEFAULT 0,
    progress          BLOB,
    -- True while no worker is to take the job before there is an operator's word beyond `reviews_done`.
    waits             INTEGER NOT NULL DEFAULT 0,
    -- Number of the last word that a worker has acted on.
    reviews_done      INTEGER NOT NULL DEFAULT 0,
    waiting_iteration INTEGER,
    CHECK ((token IS NULL) = (expires_at IS NULL)),
    CHECK ((token IS NULL) = (worker IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX worker_jobs_held ON worker_jobs (expires_at) WHERE token IS NOT NULL;

CREATE TABLE worker_journal (
    job_id TEXT NOT NULL REFERENCES worker_jobs (job_id),
    n      INTEGER NOT NULL,
    at     INTEGER NOT NULL,
    line   BLOB NOT NULL,
    PRIMARY KEY (job_id, n)
) STRICT;

-- Objects are files of the job's own folder, named by their digest.
CREATE TABLE worker_objects (
    job_id TEXT NOT NULL REFERENCES worker_jobs (job_id),
    digest BLOB NOT NULL,
    bytes  INTEGER NOT NULL,
    PRIMARY KEY (job_id, digest)
) STRICT, WITHOUT ROWID;

CREATE TABLE worker_artefacts (
    job_id TEXT NOT NULL,
    name   TEXT NOT NULL,
    digest BLOB NOT NULL,
    PRIMARY KEY (job_id, name),
    FOREIGN KEY (job_id, digest) REFERENCES worker_objects (job_id, digest)
) STRICT, WITHOUT ROWID;

CREATE INDEX worker_artefacts_by_digest ON worker_artefacts (job_id, digest);

-- Pairs of the iteration `waiting_iteration` about which an operator is asked.
CREATE TABLE worker_waiting (
    job_id TEXT NOT NULL REFERENCES worker_jobs (job_id),
    item   INTEGER NOT NULL,
    PRIMARY KEY (job_id, item)
) STRICT, WITHOUT ROWID;

-- Operators' words on pairs.
CREATE TABLE worker_reviews (
    job_id    TEXT NOT NULL REFERENCES worker_jobs (job_id),
    number    INTEGER NOT NULL,
    iteration INTEGER NOT NULL,
    item      INTEGER NOT NULL,
    accepted  INTEGER NOT NULL,
    operator  TEXT NOT NULL,
    at        INTEGER NOT NULL,
    PRIMARY KEY (job_id, number)
) STRICT, WITHOUT ROWID;

CREATE INDEX worker_reviews_by_pair ON worker_reviews (job_id, iteration, item, number);
