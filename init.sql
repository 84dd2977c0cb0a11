-- Schema, roles and demo accounts. psql runs it once, on an empty database.
\set ON_ERROR_STOP on
\getenv transaksi_password TRANSAKSI_DB_PASSWORD
\getenv mutasi_password MUTASI_DB_PASSWORD

-- One transaction: an interrupted first start leaves no partial schema.
BEGIN;

CREATE ROLE transaksi LOGIN PASSWORD :'transaksi_password';
CREATE ROLE mutasi LOGIN PASSWORD :'mutasi_password';

-- Settings of the roles' sessions, also behind a connection pooler.
SELECT format('ALTER ROLE %I SET %I = %L', role, name, value)
FROM (VALUES ('transaksi'), ('mutasi')) AS roles (role), (VALUES
    ('timezone', 'UTC'),
    ('statement_timeout', '5s'),
    ('lock_timeout', '2500ms'),
    ('idle_in_transaction_session_timeout', '10s'),  -- ends sessions of a service that hangs
    ('idle_session_timeout', '0'),                   -- pooled connections may be idle
    ('default_transaction_isolation', 'read committed'),  -- what the statements are made for
    ('synchronous_commit', 'on'),                    -- an answered movement is on disk
    -- A session caches the plans of its foreign key checks. One made while a table is small
    -- would scan the whole table when it is large.
    ('enable_seqscan', 'off')
) AS settings (name, value) \gexec

CREATE TYPE jenis_transaksi AS ENUM ('tabung', 'tarik');

-- Customers and their balances. JSON clients read integers up to 2^53-1 exactly.
CREATE TABLE rekening (
    no_rekening text PRIMARY KEY CHECK (no_rekening ~ '^[0-9]{10,16}$'),
    nama        text NOT NULL CHECK (nama <> ''),
    saldo       bigint NOT NULL DEFAULT 0 CHECK (saldo BETWEEN 0 AND 9007199254740991),
    dibuat_pada timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);  -- leaves room for the new version of a row on its page (HOT updates)

-- PINs, apart from the balances, so PIN attempts never lock an account row.
CREATE TABLE kredensial (
    no_rekening     text PRIMARY KEY REFERENCES rekening,
    pin_hash        text NOT NULL  -- bcrypt, cost 10
        CHECK (pin_hash ~ '^\$2[aby]\$10\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}$'),
    pin_gagal       integer NOT NULL DEFAULT 0  -- attempts since the last correct PIN
        CHECK (pin_gagal >= 0),
    terkunci_sampai timestamptz
) WITH (fillfactor = 50);

-- The journal: one row for each accepted movement, append-only.
CREATE TABLE transaksi (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    no_rekening       text NOT NULL REFERENCES rekening,
    jenis_transaksi   jenis_transaksi NOT NULL,
    nominal           bigint NOT NULL CHECK (nominal BETWEEN 1 AND 1000000000000),
    saldo_akhir       bigint NOT NULL CHECK (saldo_akhir BETWEEN 0 AND 9007199254740991),
    -- not now(), which is the start of the transaction: before it waited for the account's lock
    tanggal_transaksi timestamptz NOT NULL DEFAULT clock_timestamp(),
    idempotency_key   text CHECK (length(idempotency_key) BETWEEN 1 AND 255),
    traceparent       text,  -- W3C Trace Context of the request: its trace continues in the stream
    UNIQUE (id, no_rekening, jenis_transaksi, nominal, tanggal_transaksi)  -- mutasi refers to it
);
-- One key moves money once.
CREATE UNIQUE INDEX transaksi_idempotency_key ON transaksi (no_rekening, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- The outbox: movements that are not booked yet, written in the movement's own transaction.
CREATE TABLE outbox (
    id_transaksi bigint PRIMARY KEY REFERENCES transaksi,
    dikirim_pada timestamptz NOT NULL DEFAULT clock_timestamp()  -- when it was written or resent
) WITH (  -- small but changed all the time
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000
);

-- The booked movements, append-only, written by service mutasi. Duplicates conflict with the
-- primary key and are ignored. The foreign key refuses a message that differs from the journal.
CREATE TABLE mutasi (
    id_transaksi      bigint PRIMARY KEY,
    no_rekening       text NOT NULL,
    tanggal_transaksi timestamptz NOT NULL,
    jenis_transaksi   jenis_transaksi NOT NULL,
    nominal           bigint NOT NULL,
    dicatat_pada      timestamptz NOT NULL DEFAULT clock_timestamp(),
    FOREIGN KEY (id_transaksi, no_rekening, jenis_transaksi, nominal, tanggal_transaksi)
        REFERENCES transaksi (id, no_rekening, jenis_transaksi, nominal, tanggal_transaksi)
);
CREATE INDEX mutasi_no_rekening ON mutasi (no_rekening, id_transaksi);

-- For each account: balance = journal = booked movements. Both differences are zero once the
-- outbox is empty.
CREATE VIEW audit_saldo AS
SELECT
    r.no_rekening,
    r.saldo,
    r.saldo - coalesce(sum(
        CASE WHEN t.jenis_transaksi = 'tabung' THEN t.nominal ELSE -t.nominal END
    ), 0) AS selisih_transaksi,
    r.saldo - coalesce(sum(
        CASE WHEN m.jenis_transaksi = 'tabung' THEN m.nominal ELSE -m.nominal END
    ), 0) AS selisih_mutasi
FROM rekening r
LEFT JOIN transaksi t USING (no_rekening)
LEFT JOIN mutasi m ON m.id_transaksi = t.id
GROUP BY r.no_rekening;

-- Each service may do only what its statements need, and nothing in other databases. Nobody
-- but the owner may change or delete a row of transaksi or mutasi.
REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC;
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO transaksi, mutasi;

GRANT SELECT (no_rekening, saldo), UPDATE (saldo) ON rekening TO transaksi;
GRANT SELECT, UPDATE (pin_gagal, terkunci_sampai) ON kredensial TO transaksi;
GRANT
    SELECT,
    INSERT (no_rekening, jenis_transaksi, nominal, saldo_akhir, idempotency_key, traceparent)
    ON transaksi TO transaksi;
GRANT SELECT, INSERT, UPDATE (dikirim_pada) ON outbox TO transaksi;
GRANT SELECT ON mutasi TO transaksi;  -- for GET /mutasi

GRANT
    SELECT,  -- ON CONFLICT requires it
    INSERT (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)
    ON mutasi TO mutasi;
GRANT SELECT (id_transaksi), DELETE ON outbox TO mutasi;

-- Opens an account with its first deposit (0: none), which is sent and booked like any other.
CREATE FUNCTION buka_rekening(no_rekening text, nama text, pin_hash text, setoran bigint)
RETURNS void LANGUAGE sql AS $$
    INSERT INTO rekening (no_rekening, nama, saldo) VALUES ($1, $2, $4);
    INSERT INTO kredensial (no_rekening, pin_hash) VALUES ($1, $3);
    WITH opening AS (
        INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir)
        SELECT $1, 'tabung', $4, $4 WHERE $4 > 0
        RETURNING id
    )
    INSERT INTO outbox (id_transaksi, dikirim_pada)
    SELECT id, '-infinity' FROM opening;  -- due at once
$$;
REVOKE EXECUTE ON FUNCTION buka_rekening FROM PUBLIC;

-- Demo accounts, PINs 123456, 234567 and 345678: delete this before a real first start.
SELECT buka_rekening('1234567890', 'Budi Santoso',
           '$2b$10$CxlNcIK8q19til.lbenvnuJlfS/0p3G3DAT5tMDHzVeYB1zUfq8aW', 1000000),
       buka_rekening('2345678901', 'Siti Aminah',
           '$2b$10$1Vgkzk4yNy9ohKWnq3BDiebo2Rb.r2KXmc3ml7YjYKA1ZgIVsnC/O', 500000),
       buka_rekening('3456789012', 'Agus Wijaya',
           '$2b$10$MNf84MejADa/4tBTNujQi.L280AGs5v1gacmbZp2mT88opVSHquDK', 0);

COMMIT;
