// See torn_chain.h.
#include "checkpoint/format/torn_chain.h"

#include <algorithm>
#include <bit>
#include <span>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/format/record_proof.h"
#include "checkpoint/format/zip_fields.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

using namespace zip;

constexpr size_t kByteOrder = 3, kFirstStorage = 4;  // numbers of records
constexpr int64_t kSmallBytes = 64;

uint32_t crc_of(const std::string& bytes) {
  return crc32_of(std::as_bytes(std::span(bytes.data(), bytes.size())));
}

// One byte of a CRC that was damaged differs in that byte; another record's CRC in most of them.
bool differs_in_one_byte(uint32_t a, uint32_t b) {
  const uint32_t bits = a ^ b;
  return bits != 0 && std::countl_zero(bits) / 8 == 3 - std::countr_zero(bits) / 8;
}

}  // namespace

TornChain::TornChain(const ReadableFile& file, TornFile* torn)
    : file_(file), size_(file.size_bytes()), torn_(*torn) {
  add("data.pkl", static_cast<int64_t>(torn_.pickle.size()), torn_.pickle);
  add(".format_version", 1, "1");
  add(".storage_alignment", 2, "64");
  add("byteorder", 6, "little");
  for (size_t k = 0; k < torn_.storages.size(); ++k)
    add("data/" + std::to_string(k), torn_.storages[k].size_bytes);
  add("version", 2, "3\n");
  add(".data/serialization_id", 40);
}

void TornChain::add(const std::string& name, int64_t size_bytes, const std::string& content) {
  layout_.add(torn_.prefix + "/" + name, size_bytes);
  links_.push_back({.content = content, .why = {}, .in_directory = {}});
}

// Less than `most` bytes where the file ends, none where the disk has lost them.
std::string TornChain::bytes_at(int64_t offset, int64_t most) const {
  std::string bytes(static_cast<size_t>(std::clamp<int64_t>(size_ - offset, 0, most)), '\0');
  try {
    if (!bytes.empty()) file_.read_at(offset, std::as_writable_bytes(std::span(bytes)));
  } catch (const Error& error) {
    if (!is_bad_sector(error.info())) throw;
    bytes.clear();
  }
  return bytes;
}

ZipRecord TornChain::record(size_t number) const {
  ZipRecord result = layout_.record(static_cast<int>(number));
  result.crc32 = links_[number].crc32;
  return result;
}

void TornChain::prove() {
  walk();
  read_directory();
  const size_t end = judge_directory();
  prove_by_directory(end);
  hand_over();
}

// Up to the first break; of all behind it `why` says so.
void TornChain::walk() {
  for (size_t i = 0; i < links_.size(); ++i) {
    throw_if_cancelled();
    Link& link = links_[i];
    const std::string name = layout_.record(static_cast<int>(i)).name;
    if (!break_reason_.empty()) {
      const bool beyond = layout_.record(static_cast<int>(i)).data_offset >= size_;
      link.why = beyond ? "no record of it was found in the file, which ends at byte " +
                              std::to_string(size_)
                        : break_reason_;
      continue;
    }
    link.why = why_broken(static_cast<int>(i));
    link.proven = link.why.empty();
    if (!link.proven)
      break_reason_ = "it lies behind a break at record " + name + " (" + link.why +
                      "), where what is whole may be of an older save";
  }
}

std::string TornChain::why_broken(int number) {
  const ZipRecord& at = layout_.record(number);
  Link& link = links_[static_cast<size_t>(number)];
  const std::string header = layout_.header(number);
  const std::string ends = "truncated at byte " + std::to_string(size_) + " of the file, ";
  const std::string found = bytes_at(at.header_offset, static_cast<int64_t>(header.size()));
  if (found != header) {
    const bool cut = size_ < at.data_offset && header.starts_with(found);
    return cut ? ends + "before the record's data"
               : "its local header is not what torch writes at byte " +
                     std::to_string(at.header_offset);
  }
  if (at.size_bytes == 0) return "";
  if (at.size_bytes > size_ - at.data_offset)
    return ends + std::to_string(size_ - at.data_offset) + " of its " +
           std::to_string(at.size_bytes) + " bytes are there";
  const std::string descriptor = bytes_at(
      at.data_offset + at.size_bytes, static_cast<int64_t>(layout_.descriptor(number, 0).size()));
  if (descriptor.size() >= 8) link.crc32 = static_cast<uint32_t>(load(descriptor, 4, 4));
  if (descriptor != layout_.descriptor(number, link.crc32)) {
    refuse_other_content(number);
    return at.data_offset + at.size_bytes + static_cast<int64_t>(descriptor.size()) == size_
               ? ends + "before the record's CRC"
               : "the descriptor behind the record, which holds its CRC, is damaged";
  }
  const std::string why = why_unproven(file_, record(static_cast<size_t>(number)));
  if (why.empty() && !link.content.empty() && link.crc32 != crc_of(link.content))
    refuse_other_content(number);
  return why;
}

// A small record that is whole and holds something else: of a machine of the other byte order, or
// of a later torch. What follows must not be read as if it did not say so.
void TornChain::refuse_other_content(int number) const {
  const ZipRecord& at = layout_.record(number);
  if (links_[static_cast<size_t>(number)].content.empty() || number == 0) return;
  const std::string bytes = bytes_at(at.data_offset, kSmallBytes + 16);
  for (size_t size = 1; size + 16 <= bytes.size(); ++size) {
    if (load(bytes, size, 4) != kDescriptorSignature || load(bytes, size + 8, 4) != size) continue;
    const std::string content = bytes.substr(0, size);
    if (crc_of(content) != load(bytes, size + 4, 4)) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                          .what = "The archive's byte order or version is unknown.",
                          .file = file_.path(),
                          .entry = quote(at.name),
                          .expected = quote(links_[static_cast<size_t>(number)].content),
                          .found = quote(content),
                          .next = "look for another copy of this file"});
  }
}

// The directory where this archive has it: entries count whose every byte but the CRC is right.
void TornChain::read_directory() {
  const std::string expected = layout_.directory(std::vector<uint32_t>(links_.size(), 0));
  const std::string found =
      bytes_at(layout_.directory_offset(), static_cast<int64_t>(expected.size()));
  size_t at = 0;
  for (size_t i = 0; i < links_.size(); ++i) {
    const size_t size = kCentralBytes + load(expected, at + 28, 2) + load(expected, at + 30, 2);
    if (at + size > found.size()) return;
    const std::string_view entry = std::string_view(found).substr(at, size);
    const std::string_view other = std::string_view(expected).substr(at, size);
    if (entry.substr(0, 16) == other.substr(0, 16) && entry.substr(20) == other.substr(20))
      links_[i].in_directory = static_cast<uint32_t>(load(entry, 16, 4));
    at += size;
  }
}

// Whose directory is it? Returns the first record that it may still prove: the one at the break if
// it is this save's, none otherwise. Of a directory that is an older save's, records that it agrees
// with behind the last one that it contradicts are that save's too: they fit in unseen where the
// newer one ended between two payloads.
size_t TornChain::judge_directory() {
  size_t chain = 0, contradicted = 0, last = 0;
  for (; chain < links_.size() && links_[chain].proven; ++chain) {
    const Link& link = links_[chain];
    if (!link.in_directory || *link.in_directory == link.crc32) continue;
    contradicted += differs_in_one_byte(*link.in_directory, link.crc32) ? 1 : 2;
    last = chain;
  }
  if (contradicted == 0)
    return links_[0].in_directory == crc_of(torn_.pickle) ? chain : links_.size();
  if (contradicted == 1) return links_.size();  // one byte of it is damaged
  for (size_t i = last + 1; i < chain; ++i) {
    links_[i].proven = false;
    links_[i].why = "the directory contradicts record " +
                    layout_.record(static_cast<int>(last)).name +
                    " and is of an older save: so may this record be";
  }
  return links_.size();
}

void TornChain::prove_by_directory(size_t begin) {
  for (size_t i = begin; i < links_.size(); ++i) {
    Link& link = links_[i];
    if (!link.in_directory) continue;
    link.crc32 = *link.in_directory;
    if (!link.content.empty() && i > 0 && link.crc32 != crc_of(link.content)) continue;
    link.why = why_unproven(file_, record(i));
    link.proven = link.why.empty();
  }
}

void TornChain::hand_over() {
  const Link& order = links_[kByteOrder];
  for (size_t k = 0; k < torn_.storages.size(); ++k) {
    const Link& link = links_[kFirstStorage + k];
    TornStorage& storage = torn_.storages[k];
    storage.why = link.why;
    if (link.proven && !order.proven && storage.size_bytes > 0)
      storage.why = "the record that says the byte order is not proven: " + order.why;
    if (storage.why.empty()) storage.record = record(kFirstStorage + k);
  }
}

}  // namespace isoshard::checkpoint
