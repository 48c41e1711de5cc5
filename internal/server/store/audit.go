package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// AuditRecord is a record of the audit log: of a mutation of the keysets, a confirmation of
// the clock, a backup or a restore; or, if one of Entry, Token and Agent is set, of an
// entry, a join token or an agent. The embedded Change has the time, the actor, the
// operation and the note of each.
type AuditRecord struct {
	// Number counts the records of a deployment from 1.
	Number uint64 `json:"-"` // in the key
	keyset.Change
	Entry *spireapi.EntryChange `json:",omitempty"`
	Token *spireapi.AuditToken  `json:",omitempty"`
	Agent *spireapi.AgentChange `json:",omitempty"`
}

// isFrequent reports whether an installation has so many records of this kind that old
// ones have to be deleted.
func (r *AuditRecord) isFrequent() bool { return r.Entry != nil || r.Token != nil || r.Agent != nil }

const (
	// keepAudit is how many records of the audit log are younger than a record of an
	// entry, a join token or an agent before that is deleted. Every entry that a change
	// adds, changes or removes has a record: the largest installations, of 100,000
	// entries, can replace all of them twice.
	keepAudit = 200_000
	// auditSteps is how often old records are deleted while so many new ones are written.
	auditSteps = 200
)

// AddAudit adds a record to the audit log that belongs to no change of the store.
func (d *Deployment) AddAudit(ctx context.Context, c keyset.Change) error {
	records, err := encodeAudit(AuditRecord{Change: c})
	if err != nil {
		return err
	}
	return d.write(ctx, 1, func(v state) ([]op, error) { return d.audited(v, nil, records) })
}

// Audit returns the records with a number above after, in order, limit at most; all of
// them when limit is zero. Records are never changed. Those of entries, join tokens and
// agents are deleted when 200,000 later ones exist, in steps of a thousand.
func (d *Deployment) Audit(ctx context.Context, after uint64, limit int) ([]AuditRecord, error) {
	var records []AuditRecord
	err := d.read(ctx, func(b *bbolt.Bucket) error {
		c := b.Bucket([]byte(audit)).Cursor()
		k, v := c.Seek(auditKey(after))
		if bytes.Equal(k, auditKey(after)) {
			k, v = c.Next()
		}
		for ; k != nil && (limit <= 0 || len(records) < limit); k, v = c.Next() {
			r, err := decodeAudit(k, v)
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

// encodeAudit encodes records before they have a number.
func encodeAudit(records ...AuditRecord) ([][]byte, error) {
	out := make([][]byte, len(records))
	for i := range records {
		payload, err := json.Marshal(&records[i])
		if err != nil {
			return nil, fmt.Errorf("encode a record of the audit log: %w", err)
		}
		out[i] = payload
	}
	return out, nil
}

// encodeServerAudit is encodeAudit for the records of package spireapi.
func encodeServerAudit(records []*spireapi.AuditRecord) ([][]byte, error) {
	all := make([]AuditRecord, len(records))
	for i, r := range records {
		all[i] = AuditRecord{
			Change: keyset.Change{At: r.At, Actor: r.Actor, Operation: r.Operation, Note: r.Note}, Entry: r.Entry, Token: r.Token, Agent: r.Agent,
		}
	}
	return encodeAudit(all...)
}

func decodeAudit(key, value []byte) (AuditRecord, error) {
	r, err := decode[AuditRecord](key, value)
	if err == nil && len(key) != 8 {
		err = fmt.Errorf("%w: %q is not a number of the audit log", ErrDamaged, key)
	}
	if err != nil {
		return AuditRecord{}, err
	}
	r.Number = binary.BigEndian.Uint64(key)
	return r, nil
}

// audited returns the operations with those that add encoded records to the audit log, and
// delete old ones.
func (d *Deployment) audited(v state, ops []op, records [][]byte) ([]op, error) {
	if len(records) == 0 {
		return ops, nil
	}
	last, err := v.lastAudit()
	if err != nil {
		return nil, err
	}
	next := last
	for _, payload := range records {
		next++
		key := auditKey(next)
		ops = append(ops, op{audit, key, pack(key, payload)})
	}
	keep := d.s.keepAudit
	if step := keep / auditSteps; last/step == next/step || next <= keep {
		return ops, nil
	}
	old, err := v.oldAudit(min(last, next-keep))
	return append(ops, old...), err
}

// lastAudit returns the number of the last record; zero if there is none.
func (v state) lastAudit() (last uint64, err error) {
	if v.bucket == nil {
		return 0, nil
	}
	err = guard(func() error {
		if k, _ := v.bucket.Bucket([]byte(audit)).Cursor().Last(); k != nil {
			last = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return last, err
}

// oldAudit returns the operations that delete the frequent records up to a number.
func (v state) oldAudit(upTo uint64) (ops []op, err error) {
	if v.bucket == nil {
		return nil, nil
	}
	err = guard(func() error {
		c := v.bucket.Bucket([]byte(audit)).Cursor()
		for k, value := c.First(); k != nil && binary.BigEndian.Uint64(k) <= upTo; k, value = c.Next() {
			r, err := decodeAudit(k, value)
			if err != nil {
				return err
			}
			if r.isFrequent() {
				ops = append(ops, op{audit, bytes.Clone(k), nil})
			}
		}
		return nil
	})
	return ops, err
}
