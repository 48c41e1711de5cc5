package store

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server"
)

// Who holds a join token can join, so tokens are sealed as signing keys are and
// are looked up by their hash.
func tokenKey(value string) []byte {
	sum := sha256.Sum256([]byte(value))
	return sum[:]
}

func (d *Deployment) tokenContext(key []byte) []byte {
	return fmt.Appendf(nil, "renewd join token\x00%s\x00%s\x00%x", d.s.td.Name(), d.name, key)
}

func (d *Deployment) sealToken(t server.Token) (op, error) {
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

func (d *Deployment) openToken(key, value []byte) (server.Token, error) {
	sealed, err := unpack(key, value)
	if err != nil {
		return server.Token{}, err
	}
	data, err := d.s.seal.Open(sealed, d.tokenContext(key))
	if err != nil {
		return server.Token{}, fmt.Errorf("join token: %w: %s", err, rightKey)
	}
	var t server.Token
	if err := json.Unmarshal(data, &t); err != nil {
		// The error may quote the token.
		return server.Token{}, fmt.Errorf("%w: a join token is not what this program writes", ErrDamaged)
	}
	return t, nil
}

// PutToken implements server.Storage.
func (d *Deployment) PutToken(ctx context.Context, t server.Token) error {
	o, err := d.sealToken(t)
	if err != nil {
		return err
	}
	return d.write(ctx, 1, func(state) ([]op, error) { return []op{o}, nil })
}

// Token implements server.Storage.
func (d *Deployment) Token(ctx context.Context, value string) (server.Token, error) {
	key := tokenKey(value)
	var t server.Token
	err := d.read(ctx, func(b *bbolt.Bucket) (err error) {
		if stored := b.Bucket([]byte(tokens)).Get(key); stored != nil {
			t, err = d.openToken(key, stored)
		}
		return err
	})
	switch {
	case err != nil:
		return server.Token{}, err
	case t.Value == "":
		return server.Token{}, server.ErrNotFound
	}
	return t, nil
}

// TakeToken implements server.Storage.
func (d *Deployment) TakeToken(ctx context.Context, value string) (server.Token, error) {
	key := tokenKey(value)
	var t server.Token
	err := d.write(ctx, 1, func(v state) ([]op, error) {
		stored, err := v.get(tokens, key)
		if err != nil {
			return nil, err
		}
		if stored == nil {
			return nil, server.ErrNotFound
		}
		t, err = d.openToken(key, stored)
		return []op{{tokens, key, nil}}, err
	})
	if err != nil {
		return server.Token{}, err
	}
	return t, nil
}

// Tokens implements server.Storage.
func (d *Deployment) Tokens(ctx context.Context) ([]server.Token, error) {
	return all(ctx, d, tokens, d.openToken)
}
