-- What holds a job up that a worker gave back, and until when younger jobs go before it.
ALTER TABLE worker_jobs ADD COLUMN trouble TEXT;
ALTER TABLE worker_jobs ADD COLUMN not_before INTEGER;
-- True from a start of the server until the worker that held the job then has renewed its lease.
ALTER TABLE worker_jobs ADD COLUMN spared INTEGER NOT NULL DEFAULT 0;
