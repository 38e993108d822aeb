// Package rpcfault is the one table between the kinds of package fault and
// gRPC status codes, in both directions. No other package knows the codes.
package rpcfault

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// ErrorDomain marks the details that this package writes and reads.
const ErrorDomain = "quarry.dev"

// table pairs every kind with its code. Several kinds may share a code; the
// first of them is what the bare code is read back as.
var table = [...]struct {
	kind fault.Kind
	code codes.Code
}{
	{fault.Internal, codes.Internal},
	{fault.Invalid, codes.InvalidArgument},
	{fault.NotFound, codes.NotFound},
	{fault.Exists, codes.AlreadyExists},
	{fault.InUse, codes.FailedPrecondition},
	{fault.Pending, codes.Aborted},
	{fault.Conflict, codes.Aborted},
	{fault.Exhausted, codes.ResourceExhausted},
	{fault.OutOfRange, codes.OutOfRange},
	{fault.Unsupported, codes.Unimplemented},
	{fault.Unavailable, codes.Unavailable},
	{fault.Permission, codes.PermissionDenied},
	{fault.Corrupt, codes.DataLoss},
	{fault.Canceled, codes.Canceled},
	{fault.Deadline, codes.DeadlineExceeded},
}

func codeOf(k fault.Kind) codes.Code {
	for _, row := range table {
		if row.kind == k {
			return row.code
		}
	}
	return codes.Internal
}

func kindOf(c codes.Code) fault.Kind {
	for _, row := range table {
		if row.code == c {
			return row.kind
		}
	}
	if c == codes.Unauthenticated {
		return fault.Permission
	}
	return fault.Internal
}

// ToCSI translates err for a CSI client: the code and the message. The CSI
// specification demands that a status has no details. nil stays nil, and an
// error that is a gRPC status already keeps its code.
func ToCSI(err error) error {
	if err == nil {
		return nil
	}
	return toStatus(err).Err()
}

// ToStatus translates err for Quarry's own protocols: as ToCSI, and the kind,
// operation, domain and object travel in a detail that FromStatus reads.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	s := toStatus(err)
	kind := fault.KindOf(FromStatus(err))
	info := &errdetails.ErrorInfo{
		Reason:   kind.String(),
		Domain:   ErrorDomain,
		Metadata: map[string]string{"kind": strconv.Itoa(int(kind))},
	}
	var f *fault.Error
	if errors.As(err, &f) {
		put(info.Metadata, "op", f.Op)
		put(info.Metadata, "domain", f.Domain)
		put(info.Metadata, "object", f.Object)
		if f.Err != nil {
			put(info.Metadata, "cause", f.Err.Error())
		}
	}
	detailed, derr := s.WithDetails(info)
	if derr != nil { // only for an OK status
		return s.Err()
	}
	return detailed.Err()
}

func put(m map[string]string, key, value string) {
	if value != "" {
		m[key] = text(value)
	}
}

// text is what a status can carry: valid UTF-8 only.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func toStatus(err error) *status.Status {
	var f *fault.Error
	var k fault.Kind
	if !errors.As(err, &f) && !errors.As(err, &k) {
		if s, ok := status.FromError(err); ok && s.Code() != codes.Unknown {
			return status.New(s.Code(), s.Message())
		}
	}
	return status.New(codeOf(fault.KindOf(err)), text(err.Error()))
}

// FromStatus is the reverse of ToStatus: the error has the kind, operation,
// domain, object and text that the peer gave it. A status without Quarry's
// detail is read by its code alone, but for RESOURCE_EXHAUSTED: gRPC says that of
// its own limits, and then nobody knows what was done, so that it is fault.Unavailable.
// What is no status at all is returned as it is.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	out := &fault.Error{Kind: kindOf(s.Code()), Err: errors.New(s.Message())}
	if out.Kind == fault.Exhausted {
		out.Kind = fault.Unavailable
	}
	for _, d := range s.Details() {
		info, ok := d.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != ErrorDomain {
			continue
		}
		m := info.GetMetadata()
		if n, err := strconv.ParseUint(m["kind"], 10, 8); err == nil && codeOf(fault.Kind(n)) == s.Code() {
			out.Kind = fault.Kind(n)
		} else if m["kind"] == "" { // an engine in another language means what the code says
			out.Kind = kindOf(s.Code())
		}
		out.Op, out.Domain, out.Object = m["op"], m["domain"], m["object"]
		if cause := m["cause"]; cause != "" {
			out.Err = errors.New(cause)
		}
	}
	switch out.Kind {
	case fault.Canceled:
		out.Err = remote{out.Err, context.Canceled}
	case fault.Deadline:
		out.Err = remote{out.Err, context.DeadlineExceeded}
	}
	return out
}

// remote keeps a peer's text and lets errors.Is find the context's error.
type remote struct {
	error
	is error
}

func (r remote) Unwrap() error { return r.is }

// CodeName is the code that err is sent as, spelled as in the gRPC
// specification ("OK", "NOT_FOUND"), for logs and metrics.
func CodeName(err error) string {
	if err == nil {
		return "OK"
	}
	return code.Code(toStatus(err).Code()).String()
}
