-- Schema, roles and demo accounts. psql runs it once, as a superuser, on an empty database.
\set ON_ERROR_STOP on
\getenv transaksi_password TRANSAKSI_DB_PASSWORD
\getenv mutasi_password MUTASI_DB_PASSWORD

-- One transaction: an interrupted first start leaves nothing half made.
BEGIN;

CREATE ROLE transaksi LOGIN PASSWORD :'transaksi_password';
CREATE ROLE mutasi LOGIN PASSWORD :'mutasi_password';

CREATE TYPE jenis_transaksi AS ENUM ('tabung', 'tarik');

-- Customers and their balances. 2^53-1 is the largest integer that every JSON client reads exactly.
CREATE TABLE rekening (
    no_rekening text PRIMARY KEY CHECK (no_rekening ~ '^[0-9]{10,16}$'),
    nama        text NOT NULL CHECK (nama <> ''),
    saldo       bigint NOT NULL DEFAULT 0 CHECK (saldo BETWEEN 0 AND 9007199254740991),
    dibuat_pada timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);  -- leaves room for the new version of a row on its page (HOT updates)

-- PINs, apart from the balances: guessing never locks a row of money, and service mutasi has no right here.
CREATE TABLE kredensial (
    no_rekening     text PRIMARY KEY REFERENCES rekening,
    pin_hash        text NOT NULL  -- bcrypt, cost 10
        CHECK (pin_hash ~ '^\$2[aby]\$10\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}$'),
    pin_gagal       integer NOT NULL DEFAULT 0 CHECK (pin_gagal >= 0),  -- attempts since the last right PIN
    terkunci_sampai timestamptz
) WITH (fillfactor = 50);

-- The journal: one row per accepted movement, never changed.
CREATE TABLE transaksi (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    no_rekening       text NOT NULL REFERENCES rekening,
    jenis_transaksi   jenis_transaksi NOT NULL,
    nominal           bigint NOT NULL CHECK (nominal BETWEEN 1 AND 1000000000000),
    saldo_akhir       bigint NOT NULL CHECK (saldo_akhir BETWEEN 0 AND 9007199254740991),
    -- not now(), which is the start of the transaction: before it waited for the account's lock
    tanggal_transaksi timestamptz NOT NULL DEFAULT clock_timestamp(),
    idempotency_key   text CHECK (length(idempotency_key) BETWEEN 1 AND 255),
    traceparent       text,  -- W3C Trace Context of the request: its trace goes on in the stream
    UNIQUE (id, no_rekening, jenis_transaksi, nominal, tanggal_transaksi)  -- what mutasi refers to
);
-- One key moves money once.
CREATE UNIQUE INDEX transaksi_idempotency_key ON transaksi (no_rekening, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- Movements that the mutation book does not have yet, written in the movement's own transaction.
CREATE TABLE outbox (
    id_transaksi bigint PRIMARY KEY REFERENCES transaksi,
    dikirim_pada timestamptz NOT NULL DEFAULT clock_timestamp()  -- when it was written, or last sent again
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);  -- small, much written

-- The mutation book, written by service mutasi alone. A repeated message is in the primary key already and
-- ignored. The foreign key refuses a message that differs from the journal.
CREATE TABLE mutasi (
    id_transaksi      bigint NOT NULL,
    no_rekening       text NOT NULL,
    tanggal_transaksi timestamptz NOT NULL,
    jenis_transaksi   jenis_transaksi NOT NULL,
    nominal           bigint NOT NULL,
    dicatat_pada      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (id_transaksi, no_rekening, jenis_transaksi, nominal, tanggal_transaksi),
    FOREIGN KEY (id_transaksi, no_rekening, jenis_transaksi, nominal, tanggal_transaksi)
        REFERENCES transaksi (id, no_rekening, jenis_transaksi, nominal, tanggal_transaksi)
);
CREATE INDEX mutasi_no_rekening ON mutasi (no_rekening, id_transaksi);

-- Booking takes a movement out of the outbox, in the same transaction.
CREATE FUNCTION delete_from_outbox() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- ARRAY: looks up each id by index under every plan
    DELETE FROM public.outbox WHERE id_transaksi = ANY (ARRAY(SELECT id_transaksi FROM inserted));
    RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION delete_from_outbox FROM PUBLIC;
CREATE TRIGGER delete_from_outbox AFTER INSERT ON mutasi REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION delete_from_outbox();

-- Append-only, also for the owner.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on % refused: it is append-only', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'feature_not_supported';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON transaksi
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON mutasi
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Per account: balance = journal = mutation book. Both differences are zero once the outbox is empty.
CREATE VIEW audit_saldo AS
SELECT r.no_rekening, r.saldo, r.saldo - coalesce(sum(amount), 0) AS selisih_transaksi,
    r.saldo - coalesce(sum(amount) FILTER (WHERE m.id_transaksi IS NOT NULL), 0) AS selisih_mutasi
FROM rekening r LEFT JOIN transaksi t USING (no_rekening) LEFT JOIN mutasi m ON m.id_transaksi = t.id,
LATERAL (SELECT CASE t.jenis_transaksi WHEN 'tabung' THEN t.nominal ELSE -t.nominal END AS amount) AS signed
GROUP BY r.no_rekening;

-- Each service may do just what its statements need, and nothing in the server's other databases.
REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC;
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO transaksi, mutasi;
GRANT SELECT (no_rekening, saldo), UPDATE (saldo) ON rekening TO transaksi;
GRANT SELECT, UPDATE (pin_gagal, terkunci_sampai) ON kredensial TO transaksi;
GRANT SELECT, INSERT (no_rekening, jenis_transaksi, nominal, saldo_akhir, idempotency_key, traceparent)
    ON transaksi TO transaksi;
GRANT SELECT, INSERT, UPDATE (dikirim_pada) ON outbox TO transaksi;
GRANT SELECT ON mutasi TO transaksi;  -- for GET /mutasi
GRANT SELECT, INSERT (id_transaksi, no_rekening, tanggal_transaksi, jenis_transaksi, nominal)
    ON mutasi TO mutasi;              -- SELECT: ON CONFLICT asks for it

-- Opens an account with its first deposit (0: none), which is sent and booked like every other movement.
CREATE FUNCTION buka_rekening(no_rekening text, nama text, pin_hash text, setoran bigint) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO rekening (no_rekening, nama, saldo) VALUES ($1, $2, $4);
    INSERT INTO kredensial (no_rekening, pin_hash) VALUES ($1, $3);
    WITH opening AS (
        INSERT INTO transaksi (no_rekening, jenis_transaksi, nominal, saldo_akhir)
        SELECT $1, 'tabung', $4, $4 WHERE $4 > 0 RETURNING id)
    INSERT INTO outbox (id_transaksi, dikirim_pada) SELECT id, '-infinity' FROM opening;  -- due at once
$$;
REVOKE EXECUTE ON FUNCTION buka_rekening FROM PUBLIC;

-- Demo accounts, PINs 123456, 234567 and 345678: delete this statement before a real first start.
SELECT buka_rekening('1234567890', 'Budi Santoso',
           '$2b$10$CxlNcIK8q19til.lbenvnuJlfS/0p3G3DAT5tMDHzVeYB1zUfq8aW', 1000000),
       buka_rekening('2345678901', 'Siti Aminah',
           '$2b$10$1Vgkzk4yNy9ohKWnq3BDiebo2Rb.r2KXmc3ml7YjYKA1ZgIVsnC/O', 500000),
       buka_rekening('3456789012', 'Agus Wijaya',
           '$2b$10$MNf84MejADa/4tBTNujQi.L280AGs5v1gacmbZp2mT88opVSHquDK', 0);

COMMIT;
