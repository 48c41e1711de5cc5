package store

import (
	"context"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/keyset"
)

// rightKey is the remedy for a secret that cannot be decrypted.
const rightKey = "give the server the encryption key that the store was used with last"

// mapKeys replaces each private key in a copy of doc. The context ties a sealed key to
// its keyset and kind, so that an attacker who can write to the file cannot swap keys.
func (d *Deployment) mapKeys(doc keyset.Document, replace func(key, context []byte) ([]byte, error)) (keyset.Document, error) {
	doc.Records = slices.Clone(doc.Records)
	for i := range doc.Records {
		r := &doc.Records[i]
		for kind, key := range map[string]*[]byte{"X.509": &r.CAKey, "JWT": &r.JWTKey} {
			context := fmt.Appendf(nil, "renewd signing key\x00%s\x00%s\x00%s\x00%s", d.s.td.Name(), d.name, r.ID, kind)
			changed, err := replace(*key, context)
			if err != nil {
				return keyset.Document{}, fmt.Errorf("%s key of keyset %s: %w", kind, r.ID, err)
			}
			*key = changed
		}
	}
	return doc, nil
}

func (d *Deployment) seal(doc keyset.Document) (keyset.Document, error) {
	return d.mapKeys(doc, d.s.seal.Seal)
}

func (d *Deployment) unseal(doc keyset.Document) (keyset.Document, error) {
	doc, err := d.mapKeys(doc, d.s.seal.Open)
	if err != nil {
		return doc, fmt.Errorf("%w: %s", err, rightKey)
	}
	return doc, nil
}

// checkSealed decrypts everything that is sealed, and reports whether some of it is
// sealed with an older key.
func (d *Deployment) checkSealed(b *bbolt.Bucket) (reseal bool, err error) {
	doc, err := decodeDocument(b)
	if err != nil || d.s.seal == nil {
		return false, err
	}
	reseal = slices.ContainsFunc(doc.Records, func(r keyset.Record) bool {
		return !d.s.seal.Current(r.CAKey) || !d.s.seal.Current(r.JWTKey)
	})
	if _, err := d.unseal(doc); err != nil {
		return false, err
	}
	err = b.Bucket([]byte(tokens)).ForEach(func(k, v []byte) error {
		reseal = reseal || !d.s.seal.Current(v)
		_, err := d.openToken(k, v)
		return err
	})
	return reseal, err
}

// reseal seals everything with the current key, so that older keys can be removed.
func (d *Deployment) reseal(ctx context.Context) error {
	return d.write(ctx, 1, func(v state) ([]op, error) {
		doc, err := v.document()
		if err != nil {
			return nil, err
		}
		var ops []op
		if doc.Version > 0 {
			if doc, err = d.unseal(doc); err != nil {
				return nil, err
			}
			if doc, err = d.seal(doc); err != nil {
				return nil, err
			}
			o, err := put(keysets, keyDocument, doc)
			if err != nil {
				return nil, err
			}
			ops = append(ops, o)
		}
		err = v.bucket.Bucket([]byte(tokens)).ForEach(func(k, value []byte) error {
			t, err := d.openToken(k, value)
			if err != nil {
				return err
			}
			o, err := d.sealToken(t)
			ops = append(ops, o)
			return err
		})
		return ops, err
	})
}
