package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"go.etcd.io/bbolt"
)

// formatVersion is the version of the layout in the package comment. Version 1 had no
// heartbeat. Up to version 2 only the last restore was stored. Up to version 3 an entry
// had no end and an agent no selectors; an older program would lose them. Up to version 4
// a join token was deleted when it was spent, an older program would accept it again, and
// the audit log had the changes of keysets only, with the document's version as number.
const formatVersion = 5

var (
	bucketAbout       = []byte("about")
	bucketDeployments = []byte("deployments")
	keyStore          = []byte("store")
	keyName           = []byte("name")
	keyDocument       = []byte("document")
)

// The buckets of a deployment.
const (
	keysets = "keysets"
	audit   = "audit"
	agents  = "agents"
	tokens  = "tokens"
	entries = "entries"
	rows    = "ledger"
	jwt     = "jwt"
)

var buckets = []string{agents, audit, entries, jwt, keysets, rows, tokens}

// about is the value of about/store. Its key and the encoding of the version stay the
// same in all versions of the format. A change that an older program would take for
// damage, or would lose, needs a new version.
type about struct {
	version
	TrustDomain string `json:"trust_domain"`
}

type version struct {
	Format int `json:"format"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(key, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, payload)
}

// pack returns the payload followed by its checksum.
func pack(key, payload []byte) []byte {
	value := make([]byte, 0, len(payload)+4)
	value = append(value, payload...)
	return binary.BigEndian.AppendUint32(value, checksum(key, payload))
}

// unpack checks a value that pack made and returns its payload, a part of value.
func unpack(key, value []byte) ([]byte, error) {
	if len(value) < 4 {
		return nil, fmt.Errorf("%w: the value of %q is cut off", ErrDamaged, key)
	}
	payload, sum := value[:len(value)-4], value[len(value)-4:]
	if checksum(key, payload) != binary.BigEndian.Uint32(sum) {
		return nil, fmt.Errorf("%w: the checksum of %q is wrong", ErrDamaged, key)
	}
	return payload, nil
}

// decode decodes a value that packJSON made.
func decode[T any](key, value []byte) (T, error) {
	var v T
	payload, err := unpack(key, value)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(payload, &v); err != nil {
		// The error may quote the content.
		return v, fmt.Errorf("%w: the value of %q is not what this program writes", ErrDamaged, key)
	}
	return v, nil
}

func packJSON(key []byte, v any) ([]byte, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %q: %w", key, err)
	}
	return pack(key, payload), nil
}

// put returns the op that stores v as JSON.
func put(bucket string, key []byte, v any) (op, error) {
	if err := checkKey(key); err != nil {
		return op{}, err
	}
	value, err := packJSON(key, v)
	return op{bucket, key, value}, err
}

func checkKey(key []byte) error {
	switch {
	case len(key) == 0:
		return errors.New("the ID is empty")
	case len(key) > bbolt.MaxKeySize:
		return fmt.Errorf("an ID of %d bytes is too long", len(key))
	}
	return nil
}

// packTime encodes a time to the nanosecond, without its location.
func packTime(key []byte, t time.Time) []byte {
	payload := binary.BigEndian.AppendUint64(make([]byte, 0, 12), uint64(t.Unix()))
	return pack(key, binary.BigEndian.AppendUint32(payload, uint32(t.Nanosecond())))
}

func unpackTime(key, value []byte) (time.Time, error) {
	payload, err := unpack(key, value)
	if err != nil {
		return time.Time{}, err
	}
	if len(payload) != 12 {
		return time.Time{}, fmt.Errorf("%w: %q has no time", ErrDamaged, key)
	}
	return time.Unix(int64(binary.BigEndian.Uint64(payload)), int64(binary.BigEndian.Uint32(payload[8:]))).UTC(), nil
}
