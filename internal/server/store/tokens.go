package store

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// tokenKey returns the hash that a join token is looked up by. Whoever has a token can
// attest an agent, so the token itself is stored sealed, like signing keys.
func tokenKey(value string) []byte {
	sum := sha256.Sum256([]byte(value))
	return sum[:]
}

func (d *Deployment) tokenContext(key []byte) []byte {
	return fmt.Appendf(nil, "renewd join token\x00%s\x00%s\x00%x", d.s.td.Name(), d.name, key)
}

func (d *Deployment) sealToken(t spireapi.Token) (op, error) {
	key := tokenKey(t.Value)
	data, err := json.Marshal(t)
	if err != nil {
		return op{}, fmt.Errorf("encode token: %w", err)
	}
	sealed, err := d.s.seal.Seal(data, d.tokenContext(key))
	if err != nil {
		return op{}, fmt.Errorf("join token: %w", err)
	}
	return op{tokens, key, pack(key, sealed)}, nil
}

func (d *Deployment) openToken(key, value []byte) (spireapi.Token, error) {
	sealed, err := unpack(key, value)
	if err != nil {
		return spireapi.Token{}, err
	}
	data, err := d.s.seal.Open(sealed, d.tokenContext(key))
	if err != nil {
		return spireapi.Token{}, fmt.Errorf("join token: %w: %s", err, rightKey)
	}
	var t spireapi.Token
	if err := json.Unmarshal(data, &t); err != nil {
		// The error may quote the token.
		return spireapi.Token{}, fmt.Errorf("%w: a join token is not what this program writes", ErrDamaged)
	}
	return t, nil
}

// PutToken implements spireapi.Storage.
func (d *Deployment) PutToken(ctx context.Context, t spireapi.Token, records ...*spireapi.AuditRecord) error {
	o, err := d.sealToken(t)
	if err != nil {
		return err
	}
	encoded, err := encodeServerAudit(records)
	if err != nil {
		return err
	}
	return d.write(ctx, 2, func(v state) ([]op, error) { return d.audited(v, []op{o}, encoded) })
}

// spend plans that a join token is spent. It returns spireapi.ErrNotFound if there is none
// that is not.
func (d *Deployment) spend(v state, value string, at time.Time) (op, error) {
	key := tokenKey(value)
	stored, err := v.get(tokens, key)
	if err != nil {
		return op{}, err
	}
	if stored == nil {
		return op{}, spireapi.ErrNotFound
	}
	t, err := d.openToken(key, stored)
	if err != nil {
		return op{}, err
	}
	switch {
	case at.IsZero():
		return op{}, errors.New("a join token cannot be spent without a time")
	case !t.SpentAt.IsZero():
		return op{}, spireapi.ErrNotFound
	}
	t.SpentAt = at
	return d.sealToken(t)
}

// Token implements spireapi.Storage.
func (d *Deployment) Token(ctx context.Context, value string) (spireapi.Token, error) {
	key := tokenKey(value)
	var t spireapi.Token
	err := d.read(ctx, func(b *bbolt.Bucket) (err error) {
		if stored := b.Bucket([]byte(tokens)).Get(key); stored != nil {
			t, err = d.openToken(key, stored)
		}
		return err
	})
	switch {
	case err != nil:
		return spireapi.Token{}, err
	case t.Value == "":
		return spireapi.Token{}, spireapi.ErrNotFound
	}
	return t, nil
}

// TakeToken implements spireapi.Storage.
func (d *Deployment) TakeToken(ctx context.Context, value string) (spireapi.Token, error) {
	key := tokenKey(value)
	var t spireapi.Token
	err := d.write(ctx, 1, func(v state) ([]op, error) {
		stored, err := v.get(tokens, key)
		if err != nil {
			return nil, err
		}
		if stored == nil {
			return nil, spireapi.ErrNotFound
		}
		t, err = d.openToken(key, stored)
		return []op{{tokens, key, nil}}, err
	})
	if err != nil {
		return spireapi.Token{}, err
	}
	return t, nil
}

// Tokens implements spireapi.Storage.
func (d *Deployment) Tokens(ctx context.Context) ([]spireapi.Token, error) {
	return readAll(ctx, d, tokens, d.openToken)
}
