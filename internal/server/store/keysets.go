package store

import (
	"bytes"
	"context"
	"encoding/binary"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/keyset"
)

// Load implements keyset.Storage.
func (d *Deployment) Load(ctx context.Context) (keyset.Document, error) {
	var doc keyset.Document
	err := d.read(ctx, func(b *bbolt.Bucket) (err error) {
		doc, err = decodeDocument(b)
		return err
	})
	if err != nil {
		return keyset.Document{}, err
	}
	doc, err = d.unseal(doc)
	return doc, d.s.readError(err)
}

// Save implements keyset.Storage. The audit record is part of the same commit.
func (d *Deployment) Save(ctx context.Context, doc keyset.Document, c keyset.Change) error {
	sealed, err := d.seal(doc)
	if err != nil {
		return err
	}
	document, err := put(keysets, keyDocument, sealed)
	if err != nil {
		return err
	}
	record := AuditRecord{Number: doc.Version, Change: c}
	note, err := put(audit, auditKey(record.Number), record)
	if err != nil {
		return err
	}
	return d.write(ctx, 2, func(v state) ([]op, error) {
		stored, err := v.document()
		if err != nil {
			return nil, err
		}
		if doc.Version != stored.Version+1 {
			return nil, keyset.ErrConflict
		}
		return []op{document, note}, nil
	})
}

func decodeDocument(b *bbolt.Bucket) (keyset.Document, error) {
	value := b.Bucket([]byte(keysets)).Get(keyDocument)
	if value == nil {
		return keyset.Document{}, nil
	}
	return decode[keyset.Document](keyDocument, value)
}

func (v state) document() (keyset.Document, error) {
	value, err := v.get(keysets, keyDocument)
	if err != nil || value == nil {
		return keyset.Document{}, err
	}
	return decode[keyset.Document](keyDocument, value)
}

// AuditRecord is the audit log's record of one mutation of the keysets.
type AuditRecord struct {
	// Number counts the records of a deployment from 1, without a gap. It is
	// the version of the document after the mutation.
	Number uint64
	keyset.Change
}

// Audit returns the records with a number above after, in order, limit at most; all of
// them when limit is zero. Records are never changed or deleted.
func (d *Deployment) Audit(ctx context.Context, after uint64, limit int) ([]AuditRecord, error) {
	var records []AuditRecord
	err := d.read(ctx, func(b *bbolt.Bucket) error {
		c := b.Bucket([]byte(audit)).Cursor()
		k, v := c.Seek(auditKey(after))
		if bytes.Equal(k, auditKey(after)) {
			k, v = c.Next()
		}
		for ; k != nil && (limit <= 0 || len(records) < limit); k, v = c.Next() {
			r, err := decode[AuditRecord](k, v)
			if err != nil {
				return err
			}
			records = append(records, r)
		}
		return nil
	})
	return records, err
}

func auditKey(number uint64) []byte { return binary.BigEndian.AppendUint64(nil, number) }
