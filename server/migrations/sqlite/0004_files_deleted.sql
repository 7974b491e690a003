-- When an operator had deleted what the server kept for an ended job. What is left of it after a crash is given up at the next start.
ALTER TABLE worker_jobs ADD COLUMN files_deleted_at INTEGER;
