@0xb3a7c14f60d2e895;

# The message of ../record.py.
struct Record {
  path @0 :Text;
  size @1 :UInt64;
  modified @2 :Float64;
  mode @3 :UInt32;
  owner @4 :Text;
  digest @5 :Data;
  hidden @6 :Bool;
  version @7 :UInt32;
  tags @8 :List(Text);
  parts @9 :List(UInt64);
}

interface Bench {
  echo @0 (data :Data) -> (data :Data);
  revise @1 (record :Record) -> (record :Record);
  write @2 (piece :Data) -> (bytes :UInt64);
  read @3 (size :UInt32) -> (piece :Data);
}
