package store

import (
	"context"

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
	records, err := encodeAudit(AuditRecord{Change: c})
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
		return d.audited(v, []op{document}, records)
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
